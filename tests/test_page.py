"""The chat page, in a browser."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect
from starlette.responses import Response
from tests.browser import CHROMIUM, headless_chromium
from tests.scripted_server import Conversation, Paused, cut, events, model_list, refusal, scripted_server
from tests.served import served
from tests.workshop import THREADS, Workshop

from engram_runtime.serving.opening import open_engine
from engram_runtime.serving.options import EngineOptions

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to show the page in")

PICTURES = Path(__file__).parents[1] / "build"
Chunk = dict[str, Any] | str
# What SmolLM2 with the dictionary's site says of a coffin: gates as read there, and a character of two tokens.
SAID = [
    ("Entry", 0.02),
    (" for", 0.01),
    (" coffin", 0.03),
    (":", 0.02),
    (" box", 0.61),
    (" in", 0.23),
    (" which", 0.59),
]
SAID += [
    (" a", 0.72),
    (" corpse", 0.62),
    (" is", 0.03),
    (" buried", 0.79),
    (" or", 0.51),
    (" crem", 0.0),
    ("ated", 0.23),
]
SAID += [(".\n", 1.0), ("", 0.1), ("…", 0.02)]
TEXT = "".join(piece for piece, _ in SAID)
USAGE = {
    "prompt_tokens": 31,
    "completion_tokens": len(SAID),
    "prompt_tokens_details": {"cached_tokens": 20},
    "engram": {
        "sites": {
            "layer_3": {"rows": 272, "bytes": 34816, "cold": 3, "wait_ms": 0.75},
            "layer_25": {"rows": 272, "bytes": 34816, "cold": 0, "wait_ms": 0.5},
        },
        "drafts": {"made": 9, "accepted": 6},
    },
}


def token_chunk(place: int, piece: str, gate: float) -> Chunk:
    rows = list(range(100 * place, 100 * place + 16))
    sites = {
        "layer_3": {"rows": rows, "gate": gate / 2, "contribution": gate / 4 or None},
        "layer_25": {"rows": [*rows, *rows], "gate": gate, "contribution": gate / 2},
    }
    told = {"tokens": [{"id": 7 * place, "text": piece, "sites": sites}]}
    return {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None, "engram": told}]}


def plain_chunk(piece: str, reason: str | None = None) -> Chunk:
    return {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": reason}]}


SAYING = [token_chunk(place, piece, gate) for place, (piece, gate) in enumerate(SAID)]
ENDING: list[Chunk] = [plain_chunk("", "stop"), {"choices": [], "usage": USAGE}, "[DONE]"]


def plain_answer(text: str) -> Response:
    return cut(events([plain_chunk(text), *ENDING]), 1 << 16)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless_chromium() as opened:
        yield opened


@pytest.fixture
def server() -> Iterator[Conversation]:
    with scripted_server() as conversation:
        conversation.models.append(model_list("demo"))
        yield conversation


@contextmanager
def opened_page(browser: Browser, url: str) -> Iterator[Page]:
    """The page as it is when it has asked for the models; it has asked nobody else, and nothing went wrong in it."""
    with browser.new_context(viewport={"width": 900, "height": 640}) as context:
        opened = context.new_page()
        opened.set_default_timeout(5000)
        errors: list[str] = []
        requested: list[str] = []
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("console", lambda message: errors.append(message.text))
        opened.on("request", lambda request: requested.append(request.url))
        opened.goto(url)
        expect(opened.locator("#model option")).to_have_count(1)
        yield opened
        assert [error for error in errors if "the server responded with a status of" not in error] == []
        assert [asked for asked in requested if not asked.startswith(url)] == []


@pytest.fixture
def page(browser: Browser, server: Conversation) -> Iterator[Page]:
    with opened_page(browser, server.url) as opened:
        yield opened


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def colour(page: Page, selector: str, place: int) -> tuple[float, ...]:
    """Return the parts of an element's background."""
    css = page.locator(selector).nth(place).evaluate("part => getComputedStyle(part).backgroundColor")
    return tuple(map(float, re.findall(r"[-\d.]+", css.removeprefix("oklab"))))


def test_an_answer_streams_in_wherever_its_bytes_are_cut(page: Page, server: Conversation) -> None:
    server.answers += [cut(events([*SAYING, *ENDING]), size) for size in (1, 7)]
    for place in range(2):
        ask(page, "Would you mind looking up coffin?")
        reply = page.locator(".reply").nth(place)
        expect(reply.locator(".figures")).to_contain_text("stop")
        assert reply.locator(".text").text_content() == TEXT
        assert reply.locator(".column").count() == len(SAID)
        assert reply.get_attribute("aria-busy") == "false"


def test_a_model_answers(browser: Browser, workshop: Workshop) -> None:
    """What is read at the server itself is what a client without a stream is told."""
    with (
        open_engine(workshop.ready().path, options=EngineOptions(slots=1), threads=THREADS) as engine,
        served(engine) as url,
        opened_page(browser, f"{url}/") as page,
    ):
        page.get_by_text("Settings").click()
        for label, value in (("Temperature", "1"), ("Max tokens", "12"), ("Seed", "7")):
            page.get_by_label(label).fill(value)
        ask(page, "The tide")
        expect(page.locator(".figures")).to_contain_text("length")
        fields = {"temperature": 1, "max_tokens": 12, "seed": 7, "engram": {"activity": True}}
        body = {"model": engine.name, "messages": [{"role": "user", "content": "The tide"}], **fields}
        (choice,) = httpx2.post(f"{url}/v1/chat/completions", json=body).json()["choices"]
        gates = [max(site["gate"] for site in token["sites"].values()) for token in choice["engram"]["tokens"]]
        assert page.locator(".reply .text").text_content() == choice["message"]["content"]
        shown = page.locator(".token").evaluate_all("spans => spans.map(s => +s.style.getPropertyValue('--gate'))")
        assert shown == pytest.approx(gates)
        assert page.locator(".column").count() == len(gates) == 12


def test_tokens_are_seen_before_the_answer_ends(page: Page, server: Conversation) -> None:
    stream = events([*SAYING, *ENDING])
    # The cut is inside of the answer's last character.
    end = stream.index("…".encode()) + 1
    answer = Paused(stream[:end], stream[end:])
    server.answers.append(answer)
    ask(page, "coffin?")
    text = page.locator(".reply .text")
    expect(text.locator(".token")).to_have_count(len(SAID) - 1)
    assert text.text_content() == TEXT[:-1]
    assert page.locator(".reply").get_attribute("aria-busy") == "true"
    assert re.fullmatch(
        r"first token [\d,.]+ ms · [\d,.]+ tok/s · 16 tokens", page.locator(".figures").text_content() or ""
    )
    answer.go_on.set()
    expect(page.locator(".figures")).to_contain_text(
        "17 tokens · prompt 31 (20 cached) · 544 rows, 68 KiB · 3 cold · waited 1.3 ms · 6 of 9 drafts · stop"
    )


def test_what_is_asked_is_what_was_typed_and_said_before(page: Page, server: Conversation) -> None:
    server.answers += [plain_answer("first answer"), plain_answer("second answer")]
    ask(page, "first")
    expect(page.locator(".figures")).to_contain_text("stop")
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill("Be short.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Show what tables do").uncheck()
    ask(page, "second")
    expect(page.locator(".figures").nth(1)).to_contain_text("stop")
    common = {"model": "demo", "stream": True, "stream_options": {"include_usage": True}}
    first = {"role": "user", "content": "first"}
    assert server.asked == [
        {**common, "messages": [first], "engram": {"usage": True, "activity": True}},
        {
            **common,
            "messages": [
                {"role": "system", "content": "Be short."},
                first,
                {"role": "assistant", "content": "first answer"},
                {"role": "user", "content": "second"},
            ],
            "temperature": 0.5,
            "seed": 7,
            "engram": {"usage": True, "activity": False},
        },
    ]


def test_a_setting_beyond_its_limits_is_not_sent(page: Page, server: Conversation) -> None:
    page.get_by_text("Settings").click()
    page.get_by_label("Top p").fill("2")
    page.get_by_text("Settings").click()
    ask(page, "anything")
    expect(page.get_by_label("Top p")).to_be_focused()
    assert server.asked == []


def test_cells_have_the_colours_of_their_gates(page: Page, server: Conversation) -> None:
    gates = [0.0, 0.25, 0.5, 1.0]
    server.answers.append(cut(events([*(token_chunk(0, "x", gate) for gate in gates), *ENDING]), 1 << 16))
    ask(page, "x")
    expect(page.locator(".figures")).to_contain_text("stop")
    assert page.locator(".site").all_text_contents() == ["layer_3", "layer_25"]
    upper, lower = ([colour(page, ".cell", 2 * place + row) for place in range(4)] for row in range(2))
    assert lower == sorted(lower, key=lambda parts: parts[0], reverse=True)
    assert len(set(lower)) == 4
    assert (upper[2], upper[3]) == (lower[1], lower[2])
    # The middle of the scale lies in the middle of its ends.
    assert lower[2] == pytest.approx([(low + high) / 2 for low, high in zip(lower[0], lower[3], strict=True)], abs=1e-3)


def test_a_token_and_its_cells_point_at_each_other(page: Page, server: Conversation) -> None:
    server.answers.append(cut(events([*SAYING, *ENDING]), 1 << 16))
    ask(page, "coffin?")
    expect(page.locator(".figures")).to_contain_text("stop")
    tip = page.get_by_role("tooltip", include_hidden=True)
    page.get_by_text(" corpse", exact=True).hover()
    expect(page.locator(".column").nth(8)).to_have_class("column current")
    ids = " ".join(map(str, range(800, 816)))
    assert tip.locator("p").all_text_contents() == [
        '" corpse"  token 56',
        "layer_3  gate 0.310  adds 15.5 % to the stream",
        f"16 rows: {ids}",
        "layer_25  gate 0.620  adds 31 % to the stream",
        f"32 rows: {ids} 800 801 802 803 804 805 806 807 and 8 more",
    ]
    page.locator(".column").nth(12).hover()
    assert page.locator(".token.current").all_text_contents() == [" crem"]
    expect(tip).to_contain_text("layer_3  gate 0.000  adds ∞ to the stream")
    assert page.locator(".column.current").count() == 1
    page.locator("h1").hover()
    assert page.locator(".current").count() == 0
    expect(tip).to_be_hidden()


def test_the_strip_is_read_by_the_keyboard(page: Page, server: Conversation) -> None:
    server.answers.append(cut(events([*SAYING, *ENDING]), 1 << 16))
    ask(page, "coffin?")
    expect(page.locator(".figures")).to_contain_text("stop")
    page.locator("main").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label('" coffin": gate 0.01, 0.03')).to_be_focused()
    assert page.locator(".token.current").all_text_contents() == [" coffin"]
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label('"…": gate 0.01, 0.02')).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("tooltip", include_hidden=True)).to_be_hidden()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Message")).to_be_focused()


def test_stop_ends_the_request_and_keeps_what_was_said(page: Page, server: Conversation) -> None:
    answer = Paused(events(SAYING[:5]))
    server.answers += [answer, plain_answer("more")]
    ask(page, "coffin?")
    expect(page.locator(".token")).to_have_count(5)
    page.get_by_role("button", name="Stop").click()
    assert answer.ended.wait(5)
    assert not answer.go_on.is_set()
    expect(page.locator(".figures")).to_contain_text("5 tokens · stopped")
    ask(page, "go on")
    expect(page.locator(".figures").nth(1)).to_contain_text("stop")
    assert server.asked[1]["messages"][1] == {"role": "assistant", "content": "Entry for coffin: box"}


def test_a_key_is_asked_for_where_the_server_wants_one(page: Page, server: Conversation) -> None:
    server.models.clear()
    server.models += [refusal(401, "no key was given"), model_list("demo")]
    page.reload()
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.get_by_text("no key was given")).to_be_visible()
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    expect(page.get_by_label("API key")).to_be_hidden()
    expect(page.locator("#model option")).to_have_text(["demo"])
    server.answers += [refusal(401, "this key is not known"), plain_answer("hello")]
    ask(page, "hi")
    expect(page.get_by_text("this key is not known")).to_be_visible()
    expect(page.get_by_label("Message")).to_have_value("hi")
    page.get_by_label("API key").fill("other")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".reply .text")).to_have_text("hello")
    assert server.keys[-5:] == [None, "Bearer secret", "Bearer secret", "Bearer other", "Bearer other"]
    page.reload()
    expect(page.get_by_label("API key")).to_be_hidden()


def test_models_are_chosen_from_once_they_are_loaded(page: Page, server: Conversation) -> None:
    server.models.clear()
    server.models += [refusal(503, "loading"), model_list("demo", "other")]
    server.answers.append(plain_answer("hello"))
    page.reload()
    expect(page.get_by_text("The model is being loaded…")).to_be_visible()
    page.get_by_label("Model").select_option("other")
    ask(page, "hi")
    expect(page.locator(".reply .text")).to_have_text("hello")
    assert server.asked[0]["model"] == "other"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (refusal(429, "the queue is full", {"Retry-After": "2"}), "the queue is full (try again in 2 s)"),
        (refusal(400, "max_tokens 0 is below 1"), "max_tokens 0 is below 1"),
        (Response("<html>", 502), "the server answered 502 Bad Gateway"),
        (cut(events([{"error": {"message": "out of memory"}}]), 99), "out of memory"),
    ],
)
def test_a_refusal_is_shown_and_the_prompt_comes_back(
    page: Page, server: Conversation, answer: Response, said: str
) -> None:
    server.answers += [answer, plain_answer("hello")]
    ask(page, "hi")
    expect(page.get_by_role("status")).to_have_text(said)
    expect(page.get_by_label("Message")).to_have_value("hi")
    assert page.get_by_role("article").count() == 0
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".reply .text")).to_have_text("hello")
    expect(page.get_by_role("status")).to_have_text("")
    assert server.asked[0] == server.asked[1]


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ([], "the answer broke off: the connection was closed before its end"),
        ([{"error": {"message": "a table could not be read"}}], "a table could not be read"),
    ],
)
def test_an_answer_that_breaks_off_keeps_what_was_said(
    page: Page, server: Conversation, rest: list[Chunk], said: str
) -> None:
    server.answers.append(cut(events([*SAYING[:3], *rest]), 99))
    ask(page, "coffin?")
    expect(page.get_by_role("alert")).to_have_text(said)
    assert page.locator(".text").text_content() == "Entry for coffin"
    expect(page.locator(".figures")).to_contain_text("3 tokens · broken off")


def test_the_end_stays_in_sight_unless_one_reads_above(page: Page, server: Conversation) -> None:
    server.answers.append(plain_answer("line\n" * 100))
    ask(page, "hi")
    expect(page.locator(".figures")).to_be_in_viewport()
    page.get_by_text("Settings").click()
    expect(page.locator(".figures")).to_be_in_viewport()
    before = page.get_by_role("main").evaluate("main => main.scrollTop -= 500")
    page.evaluate("() => new Promise(requestAnimationFrame)")
    page.get_by_text("Settings").click()
    assert page.get_by_role("main").evaluate("main => main.scrollTop") == before


def test_text_is_never_markup(page: Page, server: Conversation) -> None:
    markup = "<img src=x onerror=alert(1)><b>&amp;</b>"
    server.answers.append(cut(events([token_chunk(0, markup, 0.5), *ENDING]), 1 << 16))
    ask(page, markup)
    expect(page.locator(".figures")).to_contain_text("stop")
    page.locator(".token").hover()
    assert page.locator(".question").text_content() == markup
    assert page.locator(".text").text_content() == markup
    assert page.locator("#chat img, #chat b, #tip img, #tip b").count() == 0


def test_a_new_chat_forgets(page: Page, server: Conversation) -> None:
    server.answers += [plain_answer("hello"), plain_answer("hello")]
    ask(page, "hi")
    expect(page.locator(".figures")).to_contain_text("stop")
    page.get_by_role("button", name="New chat").click()
    assert page.get_by_role("article").count() == 0
    ask(page, "hi")
    expect(page.locator(".figures")).to_contain_text("stop")
    assert server.asked[0] == server.asked[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_of_a_chat_are_kept(page: Page, server: Conversation, scheme: Any) -> None:
    server.answers.append(cut(events([*SAYING, *ENDING]), 1 << 16))
    page.emulate_media(color_scheme=scheme)
    ask(page, "Would you mind looking up coffin?")
    expect(page.locator(".figures")).to_contain_text("stop")
    page.get_by_text(" which", exact=True).hover()
    picture = PICTURES / f"page-{scheme}.png"
    assert page.screenshot(path=picture) == picture.read_bytes()
