"""The parts of the documentation that are made of code."""

import json

from tools.command_reference import command_reference
from tools.manifest_schema import manifest_schema
from tools.request_fields import request_fields
from tools.security_page import security_page, security_text
from tools.target_matrix import targets_page
from tools.target_schema import target_schema


def written_pages() -> dict[str, str]:
    """Return the content of each file by its name in ``docs/``."""
    return {
        "commands.md": command_reference(),
        "engram.schema.json": json.dumps(manifest_schema(), indent=1) + "\n",
        "../SECURITY.md": security_text(),
        "security.md": security_page(),
        "requests.md": request_fields(),
        "target-profile.md": target_schema(),
        "targets.md": targets_page(),
    }
