"""Continue a prompt piece by piece, and say what that took.

python -m examples.generate build/demo.engram "The capital of France is"
"""

import sys

from engram_runtime import LLM, SamplingOptions


def main(bundle: str, prompt: str) -> None:
    """Print the continuation as it comes."""
    with LLM(bundle) as llm:
        for piece in llm.stream(prompt, max_tokens=48, sampling=SamplingOptions(temperature=0.7, seed=1)):
            print(piece, end="", flush=True)
        made = llm.last
        assert made is not None
        print(f"\n{len(made.token_ids)} tokens, {made.decode_tok_s:.1f} a second, the first after {made.ttft_s:.3f} s")
        for site, read in made.tables.items():
            print(f"{site}: {read.rows} rows, {read.unique} of them distinct, {read.bytes} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
