"""Random models, targets and kinds: what they compute is what the formulas say."""

import re

import pytest
import torch
from helpers.builds import MODELS, close, logits, some_ids
from helpers.lora_formulas import KINDS, delta_by_formula, inject
from helpers.models import train_a_little
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanogpt_surgery import (
    blend_lora,
    inject_lora,
    lora_rows,
)
from nanogpt_surgery.lora.targets import adaptable_layers

NAMES = ("a", "b", "c")


@pytest.mark.parametrize("kind", MODELS)
@given(kinds=st.lists(KINDS, min_size=2, max_size=2), weights=st.tuples(*[st.floats(-2, 2)] * 2))
@settings(max_examples=15)
def test_blends_are_linear(kind, kinds, weights):
    """Seen from one adapted layer, whose output is linear in ΔW: the head."""
    model, ids = MODELS[kind](), some_ids()
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


@pytest.mark.parametrize("kind", MODELS)
@given(data=st.data())
@settings(max_examples=10)
def test_a_row_is_adapted_as_if_its_adapter_were_alone(kind, data):
    model, ids = MODELS[kind](), some_ids()
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
        results.append((out, *torch.autograd.grad((out.sin() * gains).sum(), update.trainable())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
