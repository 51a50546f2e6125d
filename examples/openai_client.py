"""Ask a running `engram serve` with the official OpenAI client: a streamed answer, and what the tables did for it.

python -m examples.openai_client http://127.0.0.1:8080/v1 "What is the capital of France?"
"""

import os
import sys

from openai import OpenAI


def main(url: str, question: str) -> None:
    """Print the answer as it comes, then the rows that each site read."""
    client = OpenAI(base_url=url, api_key=os.environ.get("ENGRAM_API_KEY", "none"), max_retries=5)
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_completion_tokens=64,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"engram": {"usage": True}},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"\n{chunk.usage.completion_tokens} tokens, {chunk.usage.prompt_tokens} before them")
            for site, read in chunk.usage.model_dump()["engram"]["sites"].items():
                print(f"{site}: {read['rows']} rows, {read['unique']} of them distinct, {read['bytes']} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
