"""What an export accepts as rounding, with experts and without."""

import pytest

from engram_export.verify import Parity, check_parity
from engram_runtime.errors import VerificationError

ONE_FLIP = Parity(tokens=100, max_abs=0.7, median_abs=1e-4, mean_abs=1e-3, argmax_agreement=0.99)
ANOTHER_MODEL = Parity(tokens=100, max_abs=3.0, median_abs=1.0, mean_abs=0.5, argmax_agreement=0.2)


def test_a_token_that_takes_another_expert_of_two_equals_is_rounding() -> None:
    check_parity(ONE_FLIP, routed=True)


@pytest.mark.parametrize(("parity", "routed"), [(ONE_FLIP, False), (ANOTHER_MODEL, True), (ANOTHER_MODEL, False)])
def test_other_logits_are_another_model(parity: Parity, routed: bool) -> None:
    with pytest.raises(VerificationError) as caught:
        check_parity(parity, routed=routed)
    assert str(caught.value) == (
        f"the graph's logits differ from the model's by {parity.max_abs:.2e} with the same weights, at most 0.002 is "
        f"rounding; this is another model"
    )
