"""A model as C computes the bits of the compiled library's portable kernels."""

from pathlib import Path

import pytest
from tests.c_runner import CExecutor, needs_gcc
from tests.test_compile import assert_same_bits
from tests.test_program import MODELS, PASSES, TOKENS, library_of, program_logits
from tests.workshop import Workshop, bundle_logits, random_ids

pytestmark = needs_gcc


@pytest.mark.parametrize("name", MODELS)
def test_c_gives_the_bits_of_the_library(workshop: Workshop, name: str, tmp_path: Path) -> None:
    bundle = MODELS[name](workshop)
    ids = random_ids(TOKENS)
    executor = CExecutor(bundle, tmp_path, PASSES, "-O1")
    assert_same_bits(program_logits(bundle, executor, ids), bundle_logits(library_of(workshop, bundle), ids, "tvm"))
