"""The optimizers compute what PyTorch's compute, and do not load its compiler."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import randomise
from helpers.training import DATASET, SETTINGS, model_of
from torch.nn.functional import cross_entropy

from nanogpt_surgery.training.fast.uncompiled import AdamW

PROGRAM = """
import sys
from helpers.training import SETTINGS, model_of, train
for muon in (False, True):
    model = model_of()
    train(model, muon=muon)
sys.exit("the compiler was loaded" if "torch._dynamo" in sys.modules else 0)
"""


def test_training_does_not_load_the_compiler() -> None:
    tests = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=tests, timeout=600)


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_pytorchs_to_the_bit(fused: bool) -> None:
    """With a closure that computes the gradients, a group of its own, and a state taken over."""
    found = []
    for kind in (AdamW, torch.optim.AdamW):
        model = model_of()
        randomise(model, 3)
        *matrices, last = model.parameters()
        optimizer = kind([{"params": matrices}], lr=SETTINGS.learning_rate, fused=fused)
        optimizer.add_param_group({"params": [last], "weight_decay": 0.5})
        for number in range(4):
            if number == 2:
                state, optimizer = optimizer.state_dict(), kind(optimizer.param_groups, fused=fused)
                optimizer.load_state_dict(state)
            optimizer.step(lambda model=model, optimizer=optimizer: gradients(model, optimizer))
        found.append(list(model.parameters()))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def gradients(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    inputs, targets = (part[None] for part in DATASET[0])
    loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    return loss
