"""A model of a few lines behind the whole server: byte tokens, a chat template, grammars, and a drafter if wanted."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tests.steps import FunctionStep
from tests.test_manifest import sound_manifest
from tests.toy_model import Scripted
from tests.toy_serving import FunctionBatchStep, Logits
from tests.toy_worker import ThreadWorker
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engram_runtime.bundle import Bundle
from engram_runtime.drafting.opening import Drafting
from engram_runtime.drafting.schedule import Always
from engram_runtime.executor import BatchInputs, State, Step, StepInputs
from engram_runtime.manifest import DECODER, Manifest
from engram_runtime.serving.engine import BundleEngine
from engram_runtime.serving.engine_protocol import Engine
from engram_runtime.serving.options import EngineOptions
from engram_runtime.serving.worker.child import Watch
from engram_runtime.serving.worker.remote import RemoteEngine
from engram_runtime.serving.worker.settings import WorkerSettings
from engram_runtime.tokenizer import TextTokenizer

CONTEXT, MODULUS = 256, 8191  # its multiples by 31 are exact in float32
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|end|>")
VOCAB = 256 + len(SPECIAL)
END = VOCAB - 1
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PASSES = (16, 4, 1)  # tokens that one takes of a prompt


def _all_logits() -> Logits:
    """Return logits ``[MODULUS, VOCAB]``; most texts are letters, and end after ten tokens or so."""
    logits = 2 * np.random.default_rng(5).standard_normal((MODULUS, VOCAB), dtype=np.float32)
    logits[:, 97:123] += 4
    logits[:, END] += 4
    return logits


LOGITS = _all_logits()


def save_byte_tokenizer(folder: Path) -> None:
    """Save a tokenizer with a token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": SPECIAL[-1], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def toy_bundle(folder: Path, context: int = CONTEXT) -> Bundle:
    """Return the bundle of a folder with a tokenizer; its one state holds a hash of the tokens at each position."""
    raw: dict[str, Any] = sound_manifest()
    raw["tables"] = []
    raw["model"] |= {"vocab_size": VOCAB, "context_length": context}
    decoder = raw["graphs"]["decoder"]
    decoder["inputs"] = decoder["inputs"][:3]
    decoder["outputs"][0]["shape"][-1] = VOCAB
    decoder["states"] = [{"name": "state", "dtype": "float32", "shape": [1, 1, context, 1], "kind": "positional"}]
    return Bundle(folder, Manifest.from_dict(raw))


def advance(state: State, token_id: int, position: int) -> int:
    """Put the hash of all tokens up to a position into a state; it follows from the one before, which must be there."""
    before = int(state[0, 0, position - 1, 0]) if position else 0
    hashed = (31 * before + token_id + 1) % MODULUS
    state[0, 0, position, 0] = hashed
    return hashed


class Hashing:
    """An executor whose logits follow from a hash of all tokens; a pass takes ``pass_s`` seconds at least."""

    name, threads, expert_bytes_read, experts_read, float16_states = "toy", 1, None, None, ()

    def __init__(self, pass_s: float = 0.0) -> None:
        self._pass_s = pass_s

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        sizes = []
        for size in PASSES:
            sizes += [size] * (count // size)
            count %= size
        return sizes

    def row_decoder(self, site: str) -> None:
        pass

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        def step(inputs: StepInputs) -> Logits:
            tokens = enumerate(inputs.token_ids.tolist(), start=inputs.position)
            logits = self._pass([(states, token_id, position) for position, token_id in tokens])
            return logits[inputs.logit_rows]

        hidden = np.zeros((CONTEXT, 8), dtype=np.float32)
        return FunctionStep(step, {"hidden": hidden})

    def batches(self, count: int) -> Sequence[int]:
        return [8] * (count // 8) + [count % 8] * (count % 8 > 0)

    def spare_rows(self, count: int) -> int:
        return 0

    def bind_batch(self, states: Sequence[Mapping[str, State]]) -> FunctionBatchStep:
        def step(inputs: BatchInputs) -> Logits:
            rows = zip(inputs.sequences, inputs.token_ids.tolist(), inputs.positions.tolist(), strict=True)
            return self._pass([(states[place], token_id, position) for place, token_id, position in rows])

        return FunctionBatchStep(step)

    def _pass(self, tokens: Sequence[tuple[Mapping[str, State], int, int]]) -> Logits:
        if self._pass_s:
            time.sleep(self._pass_s)
        logits: Logits = LOGITS[[advance(states["state"], token_id, position) for states, token_id, position in tokens]]
        return logits


def half_right(token_ids: Sequence[int]) -> int:
    """Guess the likeliest token after a text, every other time."""
    hashed = 0
    for token_id in token_ids:
        hashed = (31 * hashed + token_id + 1) % MODULUS
    return int(LOGITS[hashed].argmax()) if hashed % 2 else 97


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyEngine:
    """What a toy engine is made of.

    Attributes:
        pass_s: seconds that a pass takes at least.
        drafts: verified at once where a text is alone; 0 for none.
    """

    slots: int = 4
    queue: int = 64
    pass_s: float = 0.0
    drafts: int = 0
    context: int = CONTEXT

    @contextmanager
    def open(self, folder: Path) -> Iterator[BundleEngine]:
        """Yield an engine called ``toy``, whose tokenizer is put into a folder."""
        if not (folder / "tokenizer.json").exists():
            save_byte_tokenizer(folder)
        decoding = Drafting(Scripted(half_right), Always(self.drafts)) if self.drafts else None
        options = EngineOptions(slots=self.slots, queue=self.queue)
        bundle = toy_bundle(folder, self.context)
        tokenizer = TextTokenizer.load(folder)
        with BundleEngine(bundle, Hashing(self.pass_s), [], tokenizer, options, decoding=decoding) as engine:
            engine.name = "toy"
            yield engine

    @contextmanager
    def open_in_worker(self, folder: Path) -> Iterator[tuple[RemoteEngine, BundleEngine]]:
        """Yield one behind all that the server's process and a worker say to each other, and that one in the worker."""
        with contextlib.ExitStack() as opened:
            engine = opened.enter_context(self.open(folder))

            @contextmanager
            def opening(settings: WorkerSettings, watch: Watch) -> Iterator[Engine]:
                yield engine

            settings = WorkerSettings(path=folder, executor="toy", slots=self.slots, queue=self.queue)
            bundle, tokenizer = toy_bundle(folder, self.context), engine.tokenizer
            remote = RemoteEngine(bundle, tokenizer, settings, lambda: ThreadWorker(opening))
            remote.name = engine.name
            yield opened.enter_context(remote), engine

    def quick(self) -> "ToyEngine":
        """Return one of the same texts whose passes take no time."""
        return replace(self, pass_s=0.0)
