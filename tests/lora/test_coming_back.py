"""Layers that come back from the past find the model of today: its mode, its device, its bits."""

import pytest
import torch
from patients import PATIENTS, logits, some_ids, train_a_little
from torch import nn

from nanogpt_surgery import (
    inject_lora,
    merge_lora,
    redo_lora,
    remove_lora,
    undo_lora,
    unmerge_lora,
)


def with_dropout(training: bool, name: str = "default") -> nn.Module:
    model = PATIENTS["SimpleGPT"]().train(training)
    inject_lora(model, "q_proj", rank=2, dropout=0.5, name=name)
    train_a_little(model)
    return model


def undone_merge(model: nn.Module, now: bool) -> None:
    merge_lora(model)
    undo_lora(model.train(now))


def unmerged(model: nn.Module, now: bool) -> None:
    merge_lora(model)
    unmerge_lora(model.train(now))


def undone_removal(model: nn.Module, now: bool) -> None:
    remove_lora(model)
    undo_lora(model.train(now))


def redone_injection(model: nn.Module, now: bool) -> None:
    undo_lora(model)
    redo_lora(model.train(now))


def undone_removal_of_one(model: nn.Module, now: bool) -> None:
    """The update comes back into a wrapper that stayed, where nothing was meanwhile."""
    inject_lora(model, "v_proj", name="other")
    remove_lora(model, "default")
    undo_lora(model.train(now))
    undo_lora(model)  # the other's injection


WAYS = [undone_merge, unmerged, undone_removal, redone_injection, undone_removal_of_one]


@pytest.mark.parametrize("come_back", WAYS)
@pytest.mark.parametrize("now", [False, True])
def test_what_comes_back_is_in_the_mode_of_what_it_replaces(come_back, now):
    model, ids = with_dropout(training=not now), some_ids()
    come_back(model, now)
    assert {module.training for module in model.modules()} == {now}
    assert torch.equal(logits(model, ids), logits(model, ids)) != now


def test_a_part_of_a_model_that_is_in_a_mode_of_its_own_keeps_it():
    model = with_dropout(training=True)
    merge_lora(model)
    model.layers[0].eval()
    undo_lora(model)
    first, second = model.layers
    assert {module.training for module in first.modules()} == {False}
    assert {module.training for module in second.modules()} == {True}
