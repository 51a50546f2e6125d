"""Streams of the frozen model in the work folder: what was computed once is read again, so that work can resume."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from engram_runtime.keyers import NgramKeyer
from engram_runtime.new_file import new_file
from examples.retrofit.backbone import Backbone
from examples.retrofit.documents import CachedDocument, Document, OwnAnswer, own_answers, row_ids
from examples.retrofit.quiet_text import answered


@dataclass(frozen=True, slots=True, eq=False)
class StreamCache:
    """A folder of streams at a site.

    Attributes:
        model_name: tells models apart whose streams are in one folder.
    """

    folder: Path
    model_name: str
    backbone: Backbone
    keyer: NgramKeyer

    def documents(self, name: str, documents: Sequence[Document]) -> list[CachedDocument]:
        """Return documents with their streams, in bfloat16."""
        path = self._place(name, (json.dumps(asdict(document)) for document in documents), "pt")
        if not path.exists():
            streams = [torch.empty(0)] * len(documents)
            found = self.backbone.hidden_at_site([document.token_ids for document in documents])
            with click.progressbar(found, length=len(documents), label=f"streams of {name}", width=30) as shown:
                for index, hidden in shown:
                    streams[index] = hidden.to(torch.bfloat16)
            with new_file(path, replace=True) as file:
                torch.save(streams, file)
        streams = torch.load(path)
        return [
            CachedDocument(document, stream, row_ids(self.keyer, document.token_ids))
            for document, stream in zip(documents, streams, strict=True)
        ]

    def answers(self, name: str, questions: Sequence[str], *, tokens: int) -> list[OwnAnswer]:
        """Return what the model answers by itself; see `answered`."""
        path = self._place(f"{name}-answers-{tokens}", questions, "json")
        if not path.exists():
            with click.progressbar(length=len(questions), label=f"answers to {name}", width=30) as bar:
                documents = answered(self.backbone, questions, tokens, bar.update)
            with new_file(path, replace=True) as file:
                file.write(json.dumps([asdict(document) for document in documents]).encode())
        documents = [Document(**each) for each in json.loads(path.read_text(encoding="utf-8"))]
        return own_answers(self.backbone, self.documents(name, documents))

    def _place(self, name: str, texts: Iterable[str], suffix: str) -> Path:
        digest = hashlib.sha256(f"{self.model_name} {self.backbone.block}".encode())
        for text in texts:
            digest.update(text.encode())
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}-{digest.hexdigest()[:12]}.{suffix}"
