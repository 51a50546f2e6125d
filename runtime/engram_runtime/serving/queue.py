"""Texts that wait for a slot: one client after the other, and first come first served within each."""

from collections import deque
from collections.abc import Iterator

from engram_runtime.serving.text import Job, Text


class FairQueue:
    """Texts by client in the order of their jobs; not for several threads at once."""

    def __init__(self) -> None:
        self._texts: dict[str, deque[Text]] = {}  # the client whose turn it is first

    def __iter__(self) -> Iterator[Text]:
        return (text for texts in self._texts.values() for text in texts)

    def __len__(self) -> int:
        return sum(map(len, self._texts.values()))

    @property
    def jobs(self) -> int:
        """How many jobs texts are waiting of."""
        return len({id(text.job) for text in self})

    def add(self, text: Text) -> None:
        """Put a text behind those of its client."""
        self._texts.setdefault(text.job.client, deque()).append(text)

    def take(self) -> Text:
        """Return the next text; there must be one. Its client's next turn comes after those of the others."""
        client = next(iter(self._texts))
        texts = self._texts.pop(client)
        text = texts.popleft()
        if texts:
            self._texts[client] = texts
        return text

    def remove(self, text: Text) -> None:
        """Take a text out of turn."""
        texts = self._texts[text.job.client]
        texts.remove(text)
        if not texts:
            del self._texts[text.job.client]

    def remove_job(self, job: Job) -> None:
        """Take all texts of a job out."""
        for text in [text for text in self if text.job is job]:
            self.remove(text)
