"""Random models, targets, kinds and operations, and what must hold after any of them."""

import re
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from helpers.builds import BUILDS, HEADS, MODELS, TABLES, close, logits, some_ids
from helpers.lora_formulas import KINDS, inject, merged_by_formula
from helpers.models import train_a_little
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanogpt_surgery import (
    SurgeryError,
    blend_lora,
    disable_lora,
    enable_lora,
    merge_lora,
    redo_lora,
    remove_lora,
    swap_lora,
    tensor_hashes,
    undo_lora,
)
from nanogpt_surgery.history.model_history import history_of
from nanogpt_surgery.lora.several import active_adapters, adapter_names, has_lora, lora_layers
from nanogpt_surgery.lora.targets import adaptable_layers

NAMES = ("a", "b", "c")
VERBS = ("inject", "inject", "inject", "enable", "disable", "remove", "merge", "swap",
         "blend", "train", "undo", "redo")  # fmt: skip


def scribble(model: nn.Module) -> None:
    """Write past torch's version counter to a tensor that no operation replaces; undo must see."""
    entry = history_of(model).done[-1]
    name = next(n for n, p in model.named_parameters() if "norm" in n or "smooth.bias" in n)
    if entry.hashes is None:
        return
    tensor = dict(model.named_parameters())[name].data
    first = tensor.view(-1)[0].item()
    tensor.view(-1)[0] += 1
    with pytest.raises(SurgeryError, match=re.escape(name)):
        undo_lora(model)
    tensor.view(-1)[0] = first


def operate(model: nn.Module, data: st.DataObject) -> None:
    """Do something to a model, or let it be refused."""
    verb = data.draw(st.sampled_from(VERBS))
    name = data.draw(st.sampled_from(NAMES))
    if verb == "inject":
        bare = [re.escape(path) for path in adaptable_layers(model)]
        targets = data.draw(st.lists(st.sampled_from(bare), min_size=1, max_size=4, unique=True))
        inject(model, targets, name, data.draw(KINDS))
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
                 "undo": undo_lora, "redo": redo_lora}  # fmt: skip
        verbs[verb](model)


def operated(model: nn.Module, data: st.DataObject) -> Iterator[None]:
    """After each of some operations; those that are refused do not count."""
    for _ in range(data.draw(st.integers(0, 5))):
        with suppress(SurgeryError):
            operate(model, data)
            yield


def begin(model: nn.Module, kind: str, data: st.DataObject) -> None:
    """What operations drawn at random seldom come to: a blend, and a tie that a merge keeps."""
    start = data.draw(st.sampled_from(["bare", "blend", "tie"]))
    names = {"bare": "", "blend": "ab", "tie": "a"}[start]
    end = data.draw(st.sampled_from([HEADS[kind], TABLES[kind]]))
    for name in names:
        target = end if start == "tie" else list(adaptable_layers(model))[1]
        kept = {"tied": "both", "dora": False, "pissa": False} if start == "tie" else {}
        inject(model, target, name, data.draw(KINDS) | kept)
        train_a_little(model, seed=ord(name))
    if start == "blend":
        blend_lora(model, {name: data.draw(st.floats(-1, 2)) for name in names})


def trainable(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}


def says_tied(model: nn.Module) -> bool | None:
    return getattr(getattr(model, "config", None), "tie_word_embeddings", None)


def operations(model: nn.Module) -> int:
    return len(history_of(model).done)


@pytest.mark.parametrize("kind", MODELS)
@given(data=st.data())
@settings(max_examples=15)
def test_after_all_undos_every_tensor_is_the_first_one(kind, data):
    model = MODELS[kind](data.draw(st.booleans()), data.draw(BUILDS))
    ids, first = some_ids(), tensor_hashes(model)
    plain = logits(model, ids)
    before_all = trainable(model)
    for name in data.draw(st.sampled_from(["", "ab"])):
        inject(model, list(adaptable_layers(model))[1], name, data.draw(KINDS))
        train_a_little(model, seed=ord(name))
    for _ in range(data.draw(st.integers(1, 8))):
        before, output, count = tensor_hashes(model), logits(model, ids), operations(model)
        try:
            operate(model, data)
        except SurgeryError:
            assert tensor_hashes(model) == before, "a refused operation touched the model"
            assert torch.equal(logits(model, ids), output)
        if operations(model) == count + 1 and not history_of(model).undone:
            after = logits(model, ids)
            scribble(model)
            undo_lora(model)
            assert tensor_hashes(model) == before
            assert torch.equal(logits(model, ids), output)
            redo_lora(model)
            assert torch.equal(logits(model, ids), after)
    while history_of(model).done:
        undo_lora(model)
    assert tensor_hashes(model) == first
    assert torch.equal(logits(model, ids), plain)
    assert trainable(model) == before_all
    while history_of(model).undone:
        redo_lora(model)
    while history_of(model).done:
        undo_lora(model)
    assert tensor_hashes(model) == first


@pytest.mark.parametrize("kind", MODELS)
@given(data=st.data())
@settings(max_examples=15)
def test_undone_and_removed_the_model_is_the_first_one(kind, data):
    model, ids = MODELS[kind](data.draw(st.booleans()), data.draw(BUILDS)), some_ids()
    frozen = data.draw(st.sampled_from([0, 1, 3]))  # nothing, everything, every third
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(not frozen or index % frozen > 0)
    first, plain = tensor_hashes(model), logits(model, ids)
    facts = trainable(model), says_tied(model), is_tied(model, kind)
    begin(model, kind, data)
    for _ in operated(model, data):
        done = history_of(model).done
        if not has_lora(model) and done and done[-1].operation == "merge":
            assert trainable(model) == facts[0]
            undo_lora(model)
    if has_lora(model):
        enable_lora(model)
        swap_lora(model, adapter_names(model)[0])
        merge_lora(model, force=True)
        assert trainable(model) == facts[0]
        undo_lora(model)
        remove_lora(model)
    assert tensor_hashes(model) == first
    assert torch.equal(logits(model, ids), plain)
    assert (trainable(model), says_tied(model), is_tied(model, kind)) == facts


def is_tied(model: nn.Module, kind: str) -> bool:
    layers = [model.get_submodule(names[kind]) for names in (HEADS, TABLES)]
    weights = [getattr(layer, "original_layer", layer).weight for layer in layers]
    return weights[0] is weights[1]


@pytest.mark.parametrize("kind", MODELS)
@given(data=st.data())
@settings(max_examples=20)
def test_merged_is_adapted_and_undone_is_adapted_again(kind, data):
    model, ids = MODELS[kind](data.draw(st.booleans()), data.draw(BUILDS)), some_ids()
    begin(model, kind, data)
    for _ in operated(model, data):
        pass
    if not has_lora(model) or not active_adapters(model).names():
        return
    enable_lora(model)
    adapted, hashes, wanted = logits(model, ids), tensor_hashes(model), merged_by_formula(model)
    tied = is_tied(model, kind)
    may_part = any(layer.unties for layer in lora_layers(model).values())
    merge_lora(model, force=True)
    for name, weight in wanted.items():
        assert close(model.get_submodule(name).weight.double(), weight), name
    head, table = HEADS[kind], TABLES[kind]
    if tied:
        alike = {head, table}.isdisjoint(wanted) or (
            {head, table} <= wanted.keys() and close(wanted[head], wanted[table])
        )
        assert alike if is_tied(model, kind) else may_part
    assert not has_lora(model)
    assert close(logits(model, ids), adapted)
    undo_lora(model)
    assert torch.equal(logits(model, ids), adapted)
    assert tensor_hashes(model) == hashes
