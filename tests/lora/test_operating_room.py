"""Random models, targets, kinds and operations, and what must hold after any of them."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patients import PATIENTS, close, logits, some_ids, train_a_little
from torch import nn

from nanogpt_surgery import (
    SurgeryError,
    blend_lora,
    disable_lora,
    enable_lora,
    inject_lora,
    merge_lora,
    redo_lora,
    remove_lora,
    swap_lora,
    tensor_hashes,
    undo_lora,
    unmerge_lora,
)
from nanogpt_surgery.lora.journal import chart_of
from nanogpt_surgery.lora.lora_layer import adapter_names, has_lora
from nanogpt_surgery.lora.targets import adaptable_layers

NAMES = ("a", "b", "c")
KINDS = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 4),
        "alpha": st.sampled_from([1, 3.5, 16]),
        "rslora": st.booleans(),
        "dora": st.booleans(),
        "pissa": st.booleans(),
        "tied": st.sampled_from(["refuse", "untie", "both"]),
    }
)
VERBS = ("inject", "inject", "inject", "enable", "disable", "remove", "merge", "unmerge", "swap",
         "blend", "train", "undo", "redo")  # fmt: skip


def operate(model: nn.Module, data: st.DataObject) -> None:
    """Do something to a model, or let it be refused."""
    verb = data.draw(st.sampled_from(VERBS))
    name = data.draw(st.sampled_from(NAMES))
    if verb == "inject":
        bare = [re.escape(path) for path in adaptable_layers(model)]
        targets = data.draw(st.lists(st.sampled_from(bare), min_size=1, max_size=4, unique=True))
        inject_lora(model, targets, name=name, **data.draw(KINDS))
    elif verb == "remove":
        remove_lora(model, data.draw(st.sampled_from([None, name])))
    elif verb == "swap":
        swap_lora(model, name)
    elif verb == "blend":
        blend_lora(model, {n: data.draw(st.floats(-1, 2)) for n in adapter_names(model)})
    elif verb == "train":
        train_a_little(model)
    else:
        verbs = {"enable": enable_lora, "disable": disable_lora, "merge": merge_lora,
                 "unmerge": unmerge_lora, "undo": undo_lora, "redo": redo_lora}  # fmt: skip
        verbs[verb](model)


def operations(model: nn.Module) -> int:
    return len(chart_of(model).done)


@pytest.mark.parametrize("kind", PATIENTS)
@given(data=st.data())
@settings(max_examples=25)
def test_after_all_undos_every_tensor_is_the_first_one(kind, data):
    model = PATIENTS[kind](tied=data.draw(st.booleans()))
    ids, first = some_ids(), tensor_hashes(model)
    plain = logits(model, ids)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    for name in data.draw(st.sampled_from(["", "ab"])):
        inject_lora(model, list(adaptable_layers(model))[1], name=name, **data.draw(KINDS))
        train_a_little(model, seed=ord(name))
    for _ in range(data.draw(st.integers(1, 8))):
        before, output, count = tensor_hashes(model), logits(model, ids), operations(model)
        try:
            operate(model, data)
        except SurgeryError:
            assert tensor_hashes(model) == before, "a refused operation touched the model"
            assert torch.equal(logits(model, ids), output)
        if operations(model) == count + 1 and not chart_of(model).undone:
            after = logits(model, ids)
            undo_lora(model)
            assert tensor_hashes(model) == before
            assert torch.equal(logits(model, ids), output)
            redo_lora(model)
            assert torch.equal(logits(model, ids), after)
    while chart_of(model).done:
        undo_lora(model)
    assert tensor_hashes(model) == first
    assert torch.equal(logits(model, ids), plain)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    while chart_of(model).undone:
        redo_lora(model)
    while chart_of(model).done:
        undo_lora(model)
    assert tensor_hashes(model) == first


@pytest.mark.parametrize("kind", PATIENTS)
@given(data=st.data())
@settings(max_examples=25)
def test_merged_is_adapted_and_undone_is_adapted_again(kind, data):
    model, ids = PATIENTS[kind](tied=data.draw(st.booleans())), some_ids()
    for _ in range(data.draw(st.integers(1, 5))):
        try:
            operate(model, data)
        except SurgeryError:
            continue
    if not has_lora(model):
        return
    enable_lora(model)
    adapted, hashes = logits(model, ids), tensor_hashes(model)
    merge_lora(model)
    assert not has_lora(model)
    assert close(logits(model, ids), adapted)
    undo_lora(model)
    assert torch.equal(logits(model, ids), adapted)
    assert tensor_hashes(model) == hashes


@pytest.mark.parametrize("kind", PATIENTS)
@given(kinds=st.lists(KINDS, min_size=2, max_size=2), weights=st.tuples(*[st.floats(-2, 2)] * 2))
@settings(max_examples=15)
def test_blends_are_linear(kind, kinds, weights):
    """Seen from one adapted layer, whose output is linear in ΔW: the head."""
    model, ids = PATIENTS[kind](), some_ids()
    head = list(adaptable_layers(model))[-1]
    plain = logits(model, ids)
    changes = []
    for name, recipe in zip("ab", kinds, strict=True):
        inject_lora(model, head, name=name, **recipe)
        train_a_little(model, seed=ord(name))
        changes.append(logits(model, ids) - plain)
    blend_lora(model, dict(zip("ab", weights, strict=True)))
    wanted = plain + weights[0] * changes[0] + weights[1] * changes[1]
    assert (logits(model, ids) - wanted).abs().max() <= 1e-5 * sum(c.std() for c in changes) + 1e-5
