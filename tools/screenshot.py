"""Take a picture of the chat page of a server: python -m tools.screenshot http://127.0.0.1:8080/ docs/page.png."""

import argparse
from pathlib import Path

from playwright.sync_api import expect
from tests.browser import headless_chromium

PROMPT = "Would you mind looking up coffin?"
ANSWER_WITHIN_MS = 120_000


def take(url: str, picture: Path, *, prompt: str, dark: bool) -> None:
    """Ask the server's first model and point at the token whose gate is widest."""
    with headless_chromium() as browser:
        page = browser.new_page(
            viewport={"width": 900, "height": 560}, device_scale_factor=2, color_scheme="dark" if dark else "light"
        )
        page.goto(url)
        expect(page.locator("#model option").first).to_be_attached(timeout=ANSWER_WITHIN_MS)
        page.get_by_label("Message").fill(prompt)
        page.keyboard.press("Enter")
        expect(page.locator(".reply[aria-busy=false]")).to_be_visible(timeout=ANSWER_WITHIN_MS)
        gates = page.locator(".column").evaluate_all(
            "columns => columns.map(column => Math.max(...[...column.children].map("
            "cell => Number(cell.style.getPropertyValue('--gate')))))"
        )
        page.locator(".column").nth(gates.index(max(gates))).hover()
        page.screenshot(path=picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    take(arguments.url, arguments.picture, prompt=arguments.prompt, dark=arguments.dark)


if __name__ == "__main__":
    main()
