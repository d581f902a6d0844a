import re

import pytest
import torch
from helpers.adapters import attach_adapter
from helpers.builds import HEADS, MODELS, TABLES, close, logits, some_ids
from helpers.models import train_a_little
from torch import nn

from nanogpt_surgery import (
    SurgeryError,
    blend_lora,
    disable_lora,
    enable_lora,
    inject_lora,
    lora_rows,
    merge_lora,
    remove_lora,
    swap_lora,
)
from nanogpt_surgery.lora.several import adapter_names, lora_layers
from nanogpt_surgery.lora.stored_adapter import StoredAdapter

EVERY_PATIENT = pytest.mark.parametrize("patient", MODELS)


def three(patient: str) -> nn.Module:
    """A model with three trained adapters of other kinds, ranks and layers."""
    torch.manual_seed(0)
    model = MODELS[patient]()
    inject_lora(model, "all-linear", rank=2, name="a")
    train_a_little(model, 1)
    inject_lora(model, [HEADS[patient], TABLES[patient]], rank=3, name="b", dora=True)
    train_a_little(model, 2)
    inject_lora(model, ["all-linear", HEADS[patient]], rank=1, name="c", pissa=True, rslora=True)
    train_a_little(model, 3)
    return model


def alone(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs = {}
    for name in "abc":
        swap_lora(model, name)
        outputs[name] = logits(model, ids)
    return outputs


@EVERY_PATIENT
def test_rows_with_adapters_of_their_own_equal_each_alone(patient):
    model, ids = three(patient), some_ids(batch=6)
    outputs = alone(model, ids)
    disable_lora(model)
    plain = logits(model, ids)
    enable_lora(model)
    swap_lora(model, "a")
    rows = ["c", None, "a", "b", "a", "c"]
    with lora_rows(model, rows):
        mixed = logits(model, ids)
    for index, name in enumerate(rows):
        wanted = plain if name is None else outputs[name]
        assert close(mixed[index], wanted[index]), (index, name)
    assert torch.equal(mixed[1], plain[1])
    assert torch.equal(logits(model, ids), outputs["a"])  # what took part before does so again


@EVERY_PATIENT
def test_one_takes_part_alone_and_alone_can_be_trained(patient):
    model = three(patient)
    for name in "abc":
        report = swap_lora(model, name)
        own = {
            id(p)
            for layer in lora_layers(model).values()
            if name in layer.updates
            for p in layer.updates[name].trainable()
        }
        assert {id(p) for p in model.parameters() if p.requires_grad} == own
        assert report.summary["active"] == name


def test_a_blend_of_one_is_that_one_and_half_of_two_the_same_is_it():
    model, ids = MODELS["SimpleGPT"](), some_ids()
    inject_lora(model, "all-linear", rank=2, name="a")
    train_a_little(model, 1)
    one = logits(model, ids)
    inject_lora(model, "all-linear", rank=2, name="b")
    train_a_little(model, 1)
    for layer in lora_layers(model).values():
        layer.updates["b"].load_state_dict(layer.updates["a"].state_dict())
    blend_lora(model, {"a": 1.0})
    assert torch.equal(logits(model, ids), one)
    blend_lora(model, {"a": 0.25, "b": 0.75})
    assert close(logits(model, ids), one)


def test_a_blend_is_merged_as_it_is():
    model, ids = three("SimpleGPT"), some_ids()
    blend_lora(model, {"a": 0.5, "b": -1.0, "c": 2.0})
    blended = logits(model, ids)
    merge_lora(model)
    assert close(logits(model, ids), blended)


def test_removing_one_leaves_the_others():
    model, ids = three("SimpleGPT"), some_ids()
    outputs = alone(model, ids)
    remove_lora(model, "b")
    assert adapter_names(model) == ["a", "c"]
    assert torch.equal(logits(model, ids), outputs["c"])
    assert not any("embed_tokens" in name for name in lora_layers(model))


def test_rows_of_a_batch_can_be_trained_together():
    model, ids = three("SimpleGPT"), some_ids()
    blend_lora(model, {"a": 1, "b": 1})
    with lora_rows(model, ["a", "b", "a"]):
        model(ids).sum().backward()
    layer = lora_layers(model)["layers.0.self_attn.q_proj"]
    assert bool(layer.updates["a"].lora_B.grad.any())
    assert bool(lora_layers(model)["lm_head"].updates["b"].lora_B.grad.any())


def test_what_cannot_be_mixed_is_refused():
    model, ids = three("SimpleGPT"), some_ids()
    with pytest.raises(SurgeryError, match="no adapter 'd'"):
        swap_lora(model, "d")
    with pytest.raises(SurgeryError, match="no adapter 'd'"), lora_rows(model, ["a", "d"]):
        pass
    with pytest.raises(SurgeryError, match=r"3 rows.*for 2"), lora_rows(model, ["a", "b"]):
        model(ids)
    with pytest.raises(SurgeryError, match="lora_rows"), lora_rows(model, ["a", "b", None]):
        merge_lora(model)
    disable_lora(model)
    with pytest.raises(SurgeryError, match="disabled"), lora_rows(model, ["a", "b", None]):
        pass


@pytest.mark.parametrize(
    "name", ["", "a.b", "../up", "keys", "x" * 65, "train", "training", "_modules", "é"]
)
def test_a_name_that_no_adapter_can_have_is_refused(name):
    with pytest.raises(SurgeryError, match=re.escape(repr(name))):
        inject_lora(MODELS["another"](), "all-linear", name=name)


@pytest.mark.parametrize("name", [3, None, ["a"]])
def test_a_name_that_is_no_text_is_refused(name):
    with pytest.raises(SurgeryError, match=r"name is .*; it must be text"):
        inject_lora(MODELS["another"](), "all-linear", name=name)
    with pytest.raises(SurgeryError, match=re.escape(repr(name))):
        attach_adapter(MODELS["another"](), StoredAdapter({}), name=name)


def test_a_name_that_is_taken_is_refused():
    model = three("another")
    with pytest.raises(SurgeryError, match="named 'b'"):
        inject_lora(model, "all-linear", name="b")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": float("nan")}, "'a' is nan; it must be a number below 1e30 either way"),
        ({"a": float("inf"), "b": None}, "'a' is inf; .*'b' is None"),
        ({"a": "x"}, "'a' is 'x'"),
        ({"a": True}, "'a' is True"),
        (["a"], r"weights is \['a'\] .*Mapping"),
        ("a", "weights is 'a' .*Mapping"),
        (None, "weights is None .*Mapping"),
    ],
)
def test_weights_that_are_none_are_refused(weights, said):
    model, ids = three("another"), some_ids()
    before = logits(model, ids)
    with pytest.raises(SurgeryError, match=said):
        blend_lora(model, weights)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("names", [None, 3, "abc", ["a", 3, None]])
def test_rows_that_are_no_names_are_refused(names):
    model = three("another")
    with pytest.raises(SurgeryError, match=r"names is .*Sequence"):
        lora_rows(model, names).__enter__()
