"""Random models, targets, kinds and operations, and what must hold after any of them."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patients import HEADS, PATIENTS, TABLES, close, logits, some_ids, train_a_little
from torch import nn

from nanogpt_surgery import (
    SurgeryError,
    blend_lora,
    disable_lora,
    enable_lora,
    inject_lora,
    lora_rows,
    merge_lora,
    plan_lora,
    redo_lora,
    remove_lora,
    swap_lora,
    tensor_hashes,
    undo_lora,
    unmerge_lora,
)
from nanogpt_surgery.lora.journal import chart_of
from nanogpt_surgery.lora.lora_layer import adapter_names, has_lora, lora_layers
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


KINDS_OF = "_kinds"  # on an update: what it was asked to be


def inject(model: nn.Module, targets: str | list[str], name: str, kinds: dict) -> None:
    planned = plan_lora(model, targets, name=name, **kinds).summary
    done = inject_lora(model, targets, name=name, **kinds).summary
    assert done["trainable_parameters"] == planned["trainable_parameters"]
    for layer in lora_layers(model).values():
        if name in layer.updates:
            setattr(layer.updates[name], KINDS_OF, kinds)


def delta_by_formula(update: nn.Module, layer: nn.Module) -> torch.Tensor:
    """ΔW from A and B and what was asked for, in the layout of the weight; no code of ours."""
    kinds = getattr(update, KINDS_OF)
    scale = kinds["alpha"] / (kinds["rank"] ** 0.5 if kinds["rslora"] else kinds["rank"])
    embedding = isinstance(layer, nn.Embedding)
    weight = layer.weight.double().T if embedding else layer.weight.double()
    change = scale * update.lora_B.double() @ update.lora_A.double()
    if kinds["pissa"]:
        born = (update.inner if kinds["dora"] else update).birth
        change = change - scale * born.lora_B.double() @ born.lora_A.double()
    if kinds["dora"]:
        length = (weight + change).detach().norm(dim=1, keepdim=True)
        change = update.lora_magnitude.double()[:, None] * (weight + change) / length - weight
    return change.T if embedding else change


def merged_by_formula(model: nn.Module) -> dict[str, torch.Tensor]:
    """W + Σ w ΔW of each wrapped layer."""
    merged = {}
    for name, layer in lora_layers(model).items():
        merged[name] = layer.original_layer.weight.double()
        for adapter, weight in layer.mixture.weights.items():
            if adapter in layer.updates:
                update = layer.updates[adapter]
                merged[name] = merged[name] + weight * delta_by_formula(
                    update, layer.original_layer
                )
    return merged


def scribble(model: nn.Module) -> None:
    """Write past torch's version counter to a tensor that no operation replaces; undo must see."""
    entry = chart_of(model).done[-1]
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
                 "unmerge": unmerge_lora, "undo": undo_lora, "redo": redo_lora}  # fmt: skip
        verbs[verb](model)


def operations(model: nn.Module) -> int:
    return len(chart_of(model).done)


@pytest.mark.parametrize("kind", PATIENTS)
@given(data=st.data())
@settings(max_examples=15)
def test_after_all_undos_every_tensor_is_the_first_one(kind, data):
    model = PATIENTS[kind](tied=data.draw(st.booleans()))
    ids, first = some_ids(), tensor_hashes(model)
    plain = logits(model, ids)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
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
        if operations(model) == count + 1 and not chart_of(model).undone:
            after = logits(model, ids)
            scribble(model)
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


def is_tied(model: nn.Module, kind: str) -> bool:
    layers = [model.get_submodule(names[kind]) for names in (HEADS, TABLES)]
    weights = [getattr(layer, "original_layer", layer).weight for layer in layers]
    return weights[0] is weights[1]


@pytest.mark.parametrize("kind", PATIENTS)
@given(data=st.data())
@settings(max_examples=20)
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
    adapted, hashes, wanted = logits(model, ids), tensor_hashes(model), merged_by_formula(model)
    tied = is_tied(model, kind)
    merge_lora(model)
    for name, weight in wanted.items():
        assert close(model.get_submodule(name).weight.double(), weight), name
    head, table = HEADS[kind], TABLES[kind]
    if tied:
        assert is_tied(model, kind) == (
            {head, table}.isdisjoint(wanted)
            or ({head, table} <= wanted.keys() and close(wanted[head], wanted[table]))
        )
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


@pytest.mark.parametrize("kind", PATIENTS)
@given(data=st.data())
@settings(max_examples=10)
def test_a_row_is_adapted_as_if_its_adapter_were_alone(kind, data):
    model, ids = PATIENTS[kind](), some_ids()
    layers = [re.escape(path) for path in adaptable_layers(model)]
    outputs = {None: logits(model, ids)}
    for name in NAMES[: data.draw(st.integers(1, 3))]:
        targets = data.draw(st.lists(st.sampled_from(layers), min_size=1, max_size=4, unique=True))
        inject(model, targets, name, data.draw(KINDS))
        train_a_little(model, seed=ord(name))
        outputs[name] = logits(model, ids)
    names = data.draw(st.lists(st.sampled_from(list(outputs)), min_size=3, max_size=3))
    with lora_rows(model, names):
        mixed = logits(model, ids)
    for row, name in enumerate(names):
        assert close(mixed[row], outputs[name][row]), (row, name)


@given(kinds=KINDS, layer=st.sampled_from(["linear", "no bias", "embedding"]))
@settings(max_examples=30)
def test_outputs_and_gradients_are_those_of_the_formula(kinds, layer):
    model = nn.Sequential(
        nn.Embedding(9, 5) if layer == "embedding" else nn.Linear(5, 7, bias=layer == "linear")
    ).double()
    inject(model, "0", "a", kinds | {"tied": "refuse"})
    model.double()
    train_a_little(model)
    update, original = model[0].updates["a"], model[0].original_layer
    x = torch.arange(9) if layer == "embedding" else torch.randn(4, 5).double()
    gains = torch.linspace(-1, 1, 7 if layer != "embedding" else 5).double()
    weight = original.weight + delta_by_formula(update, original)
    wanted = weight[x] if layer == "embedding" else nn.functional.linear(x, weight, original.bias)
    results = []
    for out in (model(x), wanted):
        results.append((out, *torch.autograd.grad((out.sin() * gains).sum(), update.trained())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
