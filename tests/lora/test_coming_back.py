"""Layers that come back from the past find the model of today: its mode, its device, its bits."""

import re

import pytest
import torch
from helpers.builds import MODELS, close, logits, some_ids
from helpers.models import train_a_little
from torch import nn

from nanogpt_surgery import (
    GPTDataset,
    SurgeryError,
    fit,
    inject_lora,
    lora_log,
    merge_lora,
    redo_lora,
    remove_lora,
    tensor_hashes,
    undo_lora,
)
from nanogpt_surgery.lora.several import has_lora, lora_layers


def with_dropout(training: bool, name: str = "default") -> nn.Module:
    model = MODELS["SimpleGPT"]().train(training)
    inject_lora(model, "q_proj", rank=2, dropout=0.5, name=name)
    train_a_little(model)
    return model


def undone_merge(model: nn.Module, now: bool) -> None:
    merge_lora(model)
    undo_lora(model.train(now))


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


WAYS = [undone_merge, undone_removal, redone_injection, undone_removal_of_one]


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


def test_a_redo_counts_what_is_as_after_the_operation():
    model = with_dropout(training=False)
    merge_lora(model)
    undo_lora(model)
    summary = redo_lora(model).summary
    assert summary["as_after_the_operation"] == summary["tensors"] == len(tensor_hashes(model))
    assert summary["trained_since"] == 0


Q_PROJ = "layers.1.self_attn.q_proj"


def test_a_redo_on_a_base_that_was_written_to_is_refused_and_nothing_moves():
    model, ids = with_dropout(training=False), some_ids()
    merge_lora(model)
    undo_lora(model)
    model.layers[0].train()
    lora_layers(model)[Q_PROJ].original_layer.weight.data[0, 0] += 1
    before, modes = tensor_hashes(model), [m.training for m in model.modules()]
    with pytest.raises(SurgeryError, match=rf"redone.*1 frozen tensors.*{Q_PROJ}\.weight"):
        redo_lora(model)
    assert has_lora(model)
    assert tensor_hashes(model) == before
    assert [m.training for m in model.modules()] == modes
    adapted = logits(model.eval(), ids)
    merge_lora(model)  # what the hint says
    assert close(logits(model, ids), adapted)


def test_a_redo_of_what_was_written_to_while_it_was_undone_is_refused():
    model = with_dropout(training=False)
    merge_lora(model)
    weight = model.get_submodule(Q_PROJ).weight
    undo_lora(model)
    weight.data[0, 0] += 1
    with pytest.raises(SurgeryError, match=rf"1 frozen tensors.*{Q_PROJ}\.weight"):
        redo_lora(model)
    assert has_lora(model)
    weight.data[0, 0] -= 1
    undo_lora(model)
    assert not has_lora(model)


def test_what_an_adapter_learned_while_an_operation_was_undone_stays_and_is_told():
    model = with_dropout(training=False)
    inject_lora(model, "v_proj", name="other")
    undo_lora(model)
    train_a_little(model, seed=1)
    learned = {name: p.clone() for name, p in model.named_parameters() if ".updates." in name}
    report = redo_lora(model)
    assert report.summary["trained_since"] == len(learned) == 2 * 2
    assert all(torch.equal(model.get_parameter(name), p) for name, p in learned.items())


def nudge(tensor: torch.Tensor) -> None:
    """Past torch's version counter."""
    tensor.data.view(-1)[0] += 1


WRITTEN = {
    "a bias that the original shares": (
        f"{Q_PROJ}.bias",
        lambda model: nudge(model.get_submodule(Q_PROJ).bias),
    ),
    "another layer": ("norm.weight", lambda model: nudge(model.norm.weight)),
    "a cast": (f"{Q_PROJ}.bias", lambda model: model.get_submodule(Q_PROJ).bfloat16()),
}


def test_what_was_written_to_a_merged_weight_comes_back_with_the_redo():
    model = with_dropout(training=False)
    merge_lora(model)
    nudge(model.get_submodule(Q_PROJ).weight)
    hashes = tensor_hashes(model)
    undo_lora(model)
    redo_lora(model)
    assert tensor_hashes(model) == hashes


@pytest.mark.parametrize("what", WRITTEN)
def test_an_undo_of_a_merge_after_a_write_is_refused_and_named_and_nothing_moves(what):
    model = with_dropout(training=False)
    merge_lora(model)
    name, write = WRITTEN[what]
    write(model)
    hashes, modules = tensor_hashes(model), list(model.modules())
    with pytest.raises(SurgeryError, match=f"cannot be undone.*{re.escape(name)}"):
        undo_lora(model)
    assert tensor_hashes(model) == hashes
    assert list(model.modules()) == modules
    assert [row["operation"] for row in lora_log(model).rows] == ["inject default", "merge"]


def test_an_undo_of_a_merge_after_a_training_is_refused():
    model = with_dropout(training=False)
    merge_lora(model)
    windows = GPTDataset.from_ids(some_ids(batch=20).flatten(), block_size=7)
    list(fit(model, windows, max_steps=2, batch_size=2, device="cpu", compile="off"))
    with pytest.raises(SurgeryError, match=r"\d+ frozen tensors"):
        undo_lora(model)
    assert not has_lora(model)
