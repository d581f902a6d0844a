"""The flags of `generate` and `chat` for how answers are drawn and where they end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.options import given, options_of
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.settings import SamplingSettings, check_seed

Chosen: Any = options_of(SamplingSettings, "Sampling", leave_out=("logit_bias",))


@Parameter(name="*", group="Sampling", negative="")
@dataclass(frozen=True)
class SamplingOptions:
    """Options of sampling, and of where a text ends."""

    stop: Annotated[tuple[str, ...], Parameter(show_default=False)] = ()
    """a text that ends an answer and is not shown; may be given several times"""
    logit_bias: Annotated[tuple[str, ...], Parameter(show_default=False)] = ()
    """ID=BIAS, added to the logit of an id; -inf bans it; may be given several times"""
    seed: int | None = None
    """of the first draw, one more for each next; without it each draws differently"""
    chosen: Chosen = None

    def settings(self) -> SamplingSettings:
        """As the library takes them.

        Raises:
            SurgeryError: one of them is out of its range.
        """
        check_seed(self.seed)
        return SamplingSettings(**given(self.chosen), logit_bias=_biases(self.logit_bias))


AS_USUAL = SamplingOptions()


def _biases(written: Iterable[str]) -> dict[int, float]:
    biases = {}
    for text in written:
        index, _, bias = text.partition("=")
        try:
            biases[int(index)] = float(bias)
        except ValueError:
            raise SurgeryError(
                f"--logit-bias {text} is not ID=BIAS", "--logit-bias 42=-inf bans the id 42"
            ) from None
    return biases
