"""Answer the prompts in a text file, one a line, as lines of JSON; what neighbours begin alike is computed once.

python -m examples.prompts build/demo.engram prompts.txt > answers.jsonl
"""

import json
import sys
from pathlib import Path

from engram_runtime import LLM, EngramError


def main(bundle: str, prompts: str) -> None:
    """Print an answer, or why there is none, for each prompt."""
    with LLM(bundle) as llm:
        for prompt in Path(prompts).read_text(encoding="utf-8").splitlines():
            try:
                made = llm.generate(prompt, max_tokens=32, stop=("\n",))
            except EngramError as error:  # such as a prompt beyond the context
                print(json.dumps({"prompt": prompt, "error": str(error)}))
                continue
            print(json.dumps({"prompt": prompt, "text": made.text, "computed": made.prefilled_tokens}))


if __name__ == "__main__":
    main(*sys.argv[1:])
