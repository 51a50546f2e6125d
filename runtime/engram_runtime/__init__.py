"""Run bundles: `LLM` for most callers, `Session` and executors underneath."""

from engram_runtime.bundle import Bundle
from engram_runtime.errors import EngramError
from engram_runtime.generation import Generation
from engram_runtime.llm import LLM
from engram_runtime.sampling import SamplingOptions
from engram_runtime.session import Session
from engram_runtime.tables.options import TableOptions

__all__ = ["LLM", "Bundle", "EngramError", "Generation", "SamplingOptions", "Session", "TableOptions"]
