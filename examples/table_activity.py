"""Show for each token of a text how far its sites let their rows in, and how much those changed the stream.

python -m examples.table_activity build/demo.engram "Entry for coffin: box in which"
"""

import sys

from engram_runtime import LLM


def main(bundle: str, text: str) -> None:
    """Print a line for each token and site: gate, share of the stream, token."""
    with LLM(bundle) as llm:
        token_ids = llm.tokenizer.encode(text)
        done = 0
        for logits in llm.session.logits(token_ids):  # a chunk of the text at a time
            chunk = token_ids[done : done + len(logits)]
            for site, activity in llm.session.activity.items():
                gates = activity.gate.mean(axis=1)  # over the residual streams
                for token_id, gate, share in zip(chunk, gates, activity.contribution, strict=True):
                    token = llm.tokenizer.decode([token_id], skip_special_tokens=False)
                    print(f"{site}  {gate:5.3f} {'#' * round(20 * gate):20} {share:6.1%}  {token!r}")
            done += len(chunk)


if __name__ == "__main__":
    main(*sys.argv[1:])
