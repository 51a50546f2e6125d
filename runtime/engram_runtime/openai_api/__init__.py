"""OpenAI's chat completions and completions over a serving engine: bodies, answers and errors, without HTTP."""
