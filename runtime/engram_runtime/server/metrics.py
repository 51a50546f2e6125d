"""Figures for Prometheus."""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engram_runtime.generation import Generation
from engram_runtime.openai_api.mailbox import Told
from engram_runtime.server.models import SERVING, Models
from engram_runtime.serving.events import Finished, Token

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
PASS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """What a server counts; usable from any thread."""

    def __init__(self, models: Models) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Loads(models))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"engram_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"engram_{name}_seconds", text, ["model"], registry=registry, buckets=buckets)

        self.requests = counter("requests", "Requests answered.", "route", "status")
        self._tokens = counter("tokens", "Tokens of prompts, of those in the cache, generated.", "model", "kind")
        self._texts = counter("texts", "Texts that ended.", "model", "reason")
        self._drafts = counter("drafts", "Drafted tokens, and those that were right.", "model", "kind")
        self._tables = {
            "rows": counter("table_rows", "Rows read.", "model", "site"),
            "bytes": counter("table_bytes", "Bytes of distinct rows, pass by pass.", "model", "site"),
            "cold": counter("table_cold_rows", "Rows that the disk was asked for.", "model", "site"),
            "wait_s": counter("table_wait_seconds", "Waits for cold rows.", "model", "site"),
        }
        self._first = histogram("time_to_first_token", "From the request to a text's first token.", SECONDS)
        self._queued = histogram("queue", "In the queue.", SECONDS)
        self._passes = histogram("pass", "A forward pass.", PASS_SECONDS)

    def note_pass(self, model: str, seconds: float) -> None:
        """Count a forward pass."""
        self._passes.labels(model).observe(seconds)

    def count(self, model: str, batch: Iterable[Told]) -> None:
        """Count what an engine told of texts."""
        events = [event for _, event in batch]
        self._tokens.labels(model, "generated").inc(sum(isinstance(event, Token) for event in events))
        for event in events:
            if isinstance(event, Finished):
                self._queued.labels(model).observe(event.queued_s)
                self._count_text(model, event.generation, event.queued_s)

    def _count_text(self, model: str, made: Generation, queued_s: float) -> None:
        self._texts.labels(model, made.finish_reason).inc()
        self._tokens.labels(model, "prompt").inc(made.prompt_tokens)
        self._tokens.labels(model, "cached").inc(max(made.prompt_tokens - made.prefilled_tokens, 0))
        if made.token_ids:
            self._first.labels(model).observe(queued_s + made.ttft_s)
        if made.drafts is not None:
            self._drafts.labels(model, "made").inc(sum(made.drafts.drafted))
            self._drafts.labels(model, "accepted").inc(sum(made.drafts.accepted))
        for site, counters in made.tables.items():
            for name, metric in self._tables.items():
                metric.labels(model, site).inc(getattr(counters, name))

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _Loads(Collector):
    """What engines have to do when they are asked, and how they do."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        texts = GaugeMetricFamily("engram_load_texts", "Texts waiting, texts running, slots.", labels=["model", "kind"])
        cached = GaugeMetricFamily("engram_cache_tokens", "Tokens that slots hold.", labels=["model"])
        up = GaugeMetricFamily("engram_model_up", "Whether a model takes requests.", labels=["model"])
        restarts = CounterMetricFamily("engram_worker_restarts", "New processes of a model.", labels=["model"])
        for name, engine in dict(self._models.engines).items():
            load, health = engine.load, engine.health
            up.add_metric([name], health.status in SERVING)
            restarts.add_metric([name], health.restarts)
            for kind in ("waiting", "running", "slots"):
                texts.add_metric([name, kind], getattr(load, kind))
            cached.add_metric([name], load.cached_tokens)
        yield from (texts, cached, up, restarts)
