"""Two processes train as one does: the same batches, losses and weights."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import several_processes as several
from helpers.several_processes import DROPOUT, PRECISIONS
from helpers.training_ways import WAYS, trained
from safetensors.torch import load_file

from nanogpt_surgery import SimpleGPT, SurgeryError
from nanogpt_surgery.training.distributed import World

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes have written."""
    folder = tmp_path_factory.mktemp("several")
    command = [*TORCHRUN, "-m", "helpers.several_processes", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def written(folder: Path, way: str, rank: int) -> tuple[dict[str, torch.Tensor], list]:
    name = folder / f"{way}-{rank}"
    said = json.loads(name.with_suffix(".json").read_text())
    return load_file(name.with_suffix(".safetensors")), said


@pytest.mark.parametrize("way", [*map("-".join, product(WAYS, PRECISIONS)), *DROPOUT])
def test_the_weights_of_all_are_the_same_to_the_bit(folder, way):
    first, second = (written(folder, way, rank)[0] for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", WAYS)
def test_they_learn_what_one_does(folder, way, precision):
    model, steps = trained(way, torch.float32, device="cpu", precision=precision)
    start, off = WAYS[way][0]().state_dict(), PRECISIONS[precision]
    for rank in (0, 1):
        weights, said = written(folder, f"{way}-{precision}", rank)
        for step, line in zip(steps, said, strict=True):
            wanted = step.to_dict() | {"processes": 2, "seconds": line["seconds"]}
            assert line == {
                key: pytest.approx(value, rel=off) if isinstance(value, float) else value
                for key, value in wanted.items()
            }
        assert apart(weights, model.state_dict()) <= 4 * off * apart(start, model.state_dict())


def apart(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The distance of all weights as one vector.

    Of single ones it says little: AdamW moves a weight as far where the gradient is rounding alone.
    """
    return sum(float((some[name] - others[name]).square().sum()) for name in others) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_are_added_up_in_float32_at_least(monkeypatch, dtype):
    added = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda t, *_: added.append(t.dtype))
    parameter = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    parameter.grad = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    World(0, 2).all_reduce_gradients([parameter])
    assert added[1:] == [torch.promote_types(dtype, torch.float32)]  # after the count of gradients
    assert parameter.grad.dtype == dtype and parameter.grad.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("way", DROPOUT)
def test_dropout_and_rows_without_targets_too(folder, way):
    """As one process that computes in twice as many parts, from the first one's weights."""
    model, losses = several.dropout(way, seed=0, grad_accum_steps=4, batch_size=2)
    weights, found = written(folder, way, 1)
    assert found == pytest.approx(losses, rel=1e-5)
    for name, value in model.state_dict().items():
        if "k_proj.bias" not in name:  # attention does not depend on it: its gradient is rounding
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_that_another_has_ended_is_said_by_whatever_waits_for_it(folder):
    told = json.loads((folder / "told.json").read_text())
    assert told == ["another process of this training has ended"] * 3


def test_a_device_whose_gradients_cannot_be_added_up_is_refused():
    model = SimpleGPT(53, 24, 3, 2, 19).to("meta")
    with pytest.raises(SurgeryError, match=r"not on meta(.|\n)*device cpu"):
        World(0, 2).broadcast_parameters(model)
