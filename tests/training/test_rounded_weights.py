"""Frozen weights are cast to bfloat16 once in a training, and again where they are others."""

import copy
from contextlib import nullcontext

import pytest
import torch
from helpers.models import FAMILY_CONFIGS, random_ids, tiny_model, train_a_little

from nanogpt_surgery import (
    FitSettings,
    GPTDataset,
    fit,
    inject_lora,
    merge_lora,
    remove_lora,
    swap_lora,
    undo_lora,
)
from nanogpt_surgery.training.fast.rounded_weights import RoundedWeights, frozen_float32

LLAMA = FAMILY_CONFIGS["llama"]
DATA = GPTDataset.from_ids(random_ids(LLAMA, 1, 60)[0], 9, stride=9)
SETTINGS = FitSettings(
    max_steps=4, batch_size=4, grad_accum_steps=2, warmup_steps=0, learning_rate=1e-2, seed=3,
    device="cpu", precision="bfloat16", compile="off",
)  # fmt: skip


def adapted(targets=("q_proj", "up_proj"), **settings):
    model = tiny_model(LLAMA)
    inject_lora(model, targets, rank=2, name="one", **settings)
    train_a_little(model)
    return model


def casts(model, steps=1, **changes):
    """How many float32 tensors of a frozen weight's shape are cast in each step."""
    shape = model.layers[0].mlp.down_proj.weight.shape
    found = []
    loop = fit(model, DATA, SETTINGS, **changes)
    for _ in range(steps):
        with torch.profiler.profile(record_shapes=True) as profile:
            next(loop)
        events = [e for e in profile.events() if e.name == "aten::_to_copy"]
        found.append(sum(e.input_shapes[0] == list(shape) for e in events))
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch's profiler
def test_a_frozen_weight_is_cast_once_in_all():
    quick = casts(adapted("q_proj"), steps=3, examine=False)
    plain = casts(adapted("q_proj"), steps=3, examine=False, fast=False)
    assert quick == [LLAMA.n_layer, 0, 0]
    assert plain == [2 * LLAMA.n_layer] * 3  # once for each part of a step


@pytest.mark.parametrize("settings", [{}, {"dora": True}], ids=["plain", "dora"])
def test_losses_are_to_the_bit_as_with_casts_each_time(settings, monkeypatch):
    one = adapted(**settings)
    other = copy.deepcopy(one)
    found = [(step.loss, step.gradient_norm) for step in fit(one, DATA, SETTINGS)]
    monkeypatch.setattr(RoundedWeights, "active", lambda self, model: nullcontext())
    assert found == [(step.loss, step.gradient_norm) for step in fit(other, DATA, SETTINGS)]


def written(model):
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight.mul_(-1)


def written_by_data(model):
    model.layers[0].mlp.down_proj.weight.data.mul_(-1)


def other_data(model):
    weight = model.layers[0].mlp.down_proj.weight
    weight.data = -weight.data


def loaded(model):
    state = model.state_dict()
    name = "layers.0.mlp.down_proj.weight"
    model.load_state_dict(state | {name: -state[name]})


def merged(model):
    merge_lora(model)
    inject_lora(model, ["v_proj"], rank=2)


def undone(model):
    merge_lora(model)
    undo_lora(model)


def removed(model):
    remove_lora(model)
    inject_lora(model, ["down_proj"], rank=2, dora=True)


def swapped(model):
    inject_lora(model, ["down_proj"], rank=2, name="two")
    swap_lora(model, "one")


def thawed(model):
    model.layers[0].mlp.down_proj.requires_grad_(True)


CHANGES = [written, written_by_data, other_data, loaded, merged, undone, removed, swapped, thawed]


@pytest.mark.parametrize("change", CHANGES)
def test_no_copy_is_of_a_weight_that_was(change):
    model, rounded = adapted(), RoundedWeights()
    with rounded.active(model):
        assert model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    change(model)
    weights = {layer: layer.weight for layer in frozen_float32(model)}
    with rounded.active(model):
        assert rounded.kept.keys() == weights.keys()
        for layer, weight in weights.items():
            assert torch.equal(layer.weight, weight.bfloat16())
    assert all(layer.weight is weight for layer, weight in weights.items())


def test_what_an_update_reads_and_what_memory_is_saved_for_stays_as_it_is():
    model = adapted(["q_proj"], dora=True)
    layers = set(frozen_float32(model))
    assert model.layers[0].self_attn.q_proj.original_layer not in layers
    assert model.layers[0].self_attn.k_proj in layers
    assert model.lm_head not in layers
    assert set(frozen_float32(tiny_model(LLAMA))) == set()
    last = tiny_model(LLAMA)
    inject_lora(last, r"layers\.1\..*", rank=2)
    assert model.layers[0].mlp.down_proj in layers
    assert last.layers[0].mlp.down_proj not in set(frozen_float32(last))
