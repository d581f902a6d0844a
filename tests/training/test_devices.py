"""A training on each device there is, in each precision, beside the same in float64 on the CPU.

Without a GPU only the CPU's rows run; whoever has one runs this file there.
"""

import pytest
import torch
from helpers.models import tiny_model
from helpers.training_ways import LLAMA, WAYS, losses

from nanogpt_surgery import generate
from nanogpt_surgery.training.hardware import lacking_to_compile

THERE = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
DEVICES = [name for name, there in THERE.items() if there]
PRECISIONS = {"float32": 4e-4, "bfloat16": 1e-2}  # and how far a loss may be off, as a share


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_training_is_the_exact_one(device, way, precision):
    wanted = losses(way, torch.float64, device="cpu", precision="float32")
    found = losses(way, torch.float32, device=device, precision=precision)
    assert wanted[-1] < wanted[0] * (1 - 2 * PRECISIONS[precision])  # more than may be off
    assert found == pytest.approx(wanted, rel=PRECISIONS[precision])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_it_is_the_same(device):
    if lacking := lacking_to_compile(torch.device(device)):
        pytest.skip(f"there is no {lacking}")
    options = {"device": device, "precision": "float32"}
    wanted, found = (
        losses("everything", torch.float32, compile=how, **options) for how in ("off", "on")
    )
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_it_goes_on_with_the_same_ids(device):
    model = tiny_model(LLAMA)
    wanted = list(generate(model, [1, 2, 3], 9, temperature=0))
    assert list(generate(model.to(device), [1, 2, 3], 9, temperature=0)) == wanted
