"""How long prompts and chat templates may be."""

MAX_PROMPT_CHARS = 4 << 20  # far beyond any context length, and seconds of tokenising
MAX_TEMPLATE_BYTES = 256 << 10  # the longest in use, for many kinds of tools, are about 20 KiB
