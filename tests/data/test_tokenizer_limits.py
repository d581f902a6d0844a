"""What the limits of a stranger's tokenizer hold on a machine that does other things too."""

import time

import pytest

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.data.tokenizers.tokenizer_limits import check_speed

SIZE = 16_384  # characters that are tried first


@pytest.mark.parametrize("disturbed", [1, 3])
def test_a_disturbed_measurement_lets_no_quadratic_expression_pass(disturbed):
    """Else the whole text would be encoded: five minutes for a million characters."""
    left = {SIZE // 4: disturbed}

    def encode(text: str) -> None:
        seconds = 0.08 * (len(text) / SIZE) ** 2
        if left.get(len(text), 0):
            left[len(text)] -= 1
            seconds += 0.05
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    with pytest.raises(SurgeryError, match="1,000,000"):
        check_speed(encode, "a" * 1_000_000)


def test_an_expression_in_proportion_to_the_text_passes_however_slow():
    def encode(text: str) -> None:
        end = time.process_time() + 0.1 * len(text) / SIZE
        while time.process_time() < end:
            pass

    check_speed(encode, "a" * 1_000_000)
