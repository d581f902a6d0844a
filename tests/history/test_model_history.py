import copy
import json

import pytest
import torch
from helpers.builds import MODELS, logits, some_ids
from helpers.models import train_a_little
from torch import nn

from nanogpt_surgery import (
    SurgeryError,
    blend_lora,
    disable_lora,
    inject_lora,
    lora_log,
    merge_lora,
    redo_lora,
    remove_lora,
    swap_lora,
    tensor_hashes,
    undo_lora,
)
from nanogpt_surgery.history.model_history import operation
from nanogpt_surgery.lora.several import has_lora, lora_layers


def model_with_a_trained_adapter() -> nn.Module:
    model = MODELS["SimpleGPT"]()
    inject_lora(model, ["all-linear", "embed_tokens"], rank=2)
    train_a_little(model)
    return model


def test_undo_reports_the_hash_of_every_tensor_before_and_after():
    model = model_with_a_trained_adapter()
    before = tensor_hashes(model)
    merge_lora(model)
    merged = tensor_hashes(model)
    report = undo_lora(model)
    assert tensor_hashes(model) == before
    rows = {row["tensor"]: row for row in report.rows}
    assert rows.keys() == before.keys() | merged.keys()
    for name, digest in before.items():
        assert digest.startswith(rows[name]["after"])
    changed = {name for name, row in rows.items() if row["before"] != row["after"]}
    assert "layers.0.self_attn.q_proj.weight" in changed
    assert "lm_head.weight" not in changed
    assert report.summary["as_before_the_operation"] == report.summary["tensors"] == len(before)
    assert json.loads(report.to_json())["rows"] == report.rows
    assert "sha256" in str(report)


def test_redo_makes_the_same_bits_again():
    model = model_with_a_trained_adapter()
    merge_lora(model)
    merged = tensor_hashes(model)
    undo_lora(model)
    redo_lora(model)
    assert tensor_hashes(model) == merged
    assert not has_lora(model)


def test_training_is_not_undone():
    model = MODELS["SimpleGPT"]()
    inject_lora(model, "q_proj", name="a")
    inject_lora(model, "q_proj", name="b")
    swap_lora(model, "a")
    train_a_little(model)
    trained = logits(model, some_ids())
    undo_lora(model)
    redo_lora(model)
    assert torch.equal(logits(model, some_ids()), trained)


def test_what_was_trained_between_is_told():
    model = MODELS["SimpleGPT"]()
    inject_lora(model, "q_proj", name="a")
    inject_lora(model, "v_proj", name="b")
    swap_lora(model, "a")
    train_a_little(model)
    undo_lora(model)  # the swap
    report = undo_lora(model)  # the injection of b, whose hashes knew a untrained
    assert report.summary["trained_since"] == 2 * 2


def test_a_frozen_tensor_that_was_written_to_is_told_and_nothing_is_undone():
    model = model_with_a_trained_adapter()
    lora_layers(model)["layers.1.mlp.up_proj"].original_layer.weight.data[0, 0] += 1
    before = tensor_hashes(model)
    with pytest.raises(SurgeryError, match=r"1 frozen tensors.*layers\.1\.mlp\.up_proj\.weight"):
        undo_lora(model)
    assert tensor_hashes(model) == before
    assert has_lora(model)


def test_modules_changed_by_other_hands_stop_an_undo():
    model = model_with_a_trained_adapter()
    model.layers[0].mlp.up_proj = nn.Linear(24, 40)
    with pytest.raises(SurgeryError, match=r"other hands.*\'inject default\'.*up_proj"):
        undo_lora(model)


def test_what_takes_part_comes_back():
    model, ids = MODELS["SimpleGPT"](), some_ids()
    for name in "ab":
        inject_lora(model, "v_proj", name=name)
        train_a_little(model, seed=ord(name))
    b = logits(model, ids)
    for change in (
        lambda: swap_lora(model, "a"),
        lambda: blend_lora(model, {"a": 1, "b": 0.5}),
        lambda: disable_lora(model),
        lambda: remove_lora(model, "b"),
    ):
        change()
        assert not torch.equal(logits(model, ids), b)
        undo_lora(model)
        assert torch.equal(logits(model, ids), b)


def test_nothing_to_undo_or_redo():
    model = MODELS["another"]()
    with pytest.raises(SurgeryError, match="no operation to undo"):
        undo_lora(model)
    with pytest.raises(SurgeryError, match="no operation to redo"):
        redo_lora(model)


def test_a_new_operation_ends_what_could_be_redone():
    model = model_with_a_trained_adapter()
    merge_lora(model)
    undo_lora(model)
    disable_lora(model)
    with pytest.raises(SurgeryError, match="no operation to redo"):
        redo_lora(model)
    states = {row["operation"]: row["state"] for row in lora_log(model).rows}
    assert states == {
        "inject default": "done",
        "merge": "undone, cannot be redone",
        "disable": "done",
    }


def test_the_log_tells_what_was_done_and_undone():
    model = model_with_a_trained_adapter()
    disable_lora(model)
    undo_lora(model)
    log = lora_log(model)
    assert log.rows == [
        {"operation": "inject default", "state": "done"},
        {"operation": "disable", "state": "undone"},
    ]
    assert log.summary == {"can_undo": "inject default", "can_redo": "disable"}


def test_an_undone_merge_brings_the_wrappers_back():
    model = model_with_a_trained_adapter()
    before, adapted = tensor_hashes(model), logits(model, some_ids())
    report = merge_lora(model)
    assert {row["original"] for row in report.rows} == {"kept"}
    undo_lora(model)
    assert tensor_hashes(model) == before
    assert torch.equal(logits(model, some_ids()), adapted)
    undo_lora(model)
    assert not has_lora(model)


def test_originals_are_dropped_only_when_told_and_freed():
    model = model_with_a_trained_adapter()
    weight = lora_layers(model)["layers.0.mlp.up_proj"].original_layer.weight
    alive = torch.multiprocessing.reductions.StorageWeakRef(weight.untyped_storage())
    del weight
    report = merge_lora(model, keep_originals=False)
    assert {row["original"] for row in report.rows} == {"dropped"}
    assert alive.expired()
    with pytest.raises(SurgeryError, match="undo; 'merge'"):
        undo_lora(model)
    assert "cannot be undone" in str(lora_log(model))


@pytest.mark.parametrize("patient", MODELS)
@pytest.mark.parametrize("frozen", ["nothing", "some", "all"])
def test_an_undone_merge_brings_back_what_could_be_trained(patient, frozen):
    model = MODELS[patient]()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(frozen == "nothing" or (frozen == "some" and index % 3 > 0))
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    inject_lora(model, "all-linear", rank=2)
    train_a_little(model)
    merge_lora(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    undo_lora(model)
    merge_lora(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    undo_lora(model)
    remove_lora(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable


def test_after_an_undone_merge_a_config_says_again_that_the_weights_are_one():
    model = MODELS["transformers"](tied=True)
    inject_lora(model, "lm_head", rank=2, tied="untie")
    train_a_little(model)
    for _ in range(2):
        merge_lora(model)
        assert model.config.tie_word_embeddings is False
        undo_lora(model)
        assert model.config.tie_word_embeddings is True
    remove_lora(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_a_copy_of_a_model_has_a_journal_of_its_own():
    model = model_with_a_trained_adapter()
    before = tensor_hashes(model)
    twin = copy.deepcopy(model)
    undo_lora(twin)
    assert not has_lora(twin)
    assert tensor_hashes(model) == before
    undo_lora(model)
    assert not has_lora(model)


def test_a_failed_operation_leaves_no_trace():
    model = model_with_a_trained_adapter()
    hashes, log = tensor_hashes(model), str(lora_log(model))
    with pytest.raises(SurgeryError, match="directions"):
        inject_lora(model, ["down_proj", "embed_tokens"], rank=30, pissa=True, name="b")
    assert tensor_hashes(model) == hashes
    assert str(lora_log(model)) == log
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for layer in lora_layers(model).values() for p in layer.updates["default"].trainable()
    }


def test_operations_within_an_operation_are_one():
    model = model_with_a_trained_adapter()
    plain, count = tensor_hashes(model), len(lora_log(model).rows)
    with operation(model, "both"):
        merge_lora(model)
        inject_lora(model, ["q_proj"], name="again")
    assert [row["operation"] for row in lora_log(model).rows][count:] == ["both"]
    both = tensor_hashes(model)
    undo_lora(model)
    assert tensor_hashes(model) == plain
    redo_lora(model)
    assert tensor_hashes(model) == both


def test_an_operation_that_fails_within_another_is_taken_back_alone():
    model = model_with_a_trained_adapter()
    plain, count = tensor_hashes(model), len(lora_log(model).rows)
    with operation(model, "both"):
        merge_lora(model)
        merged = tensor_hashes(model)
        with pytest.raises(SurgeryError):
            inject_lora(model, ["down_proj", "embed_tokens"], rank=30, pissa=True, name="b")
        assert tensor_hashes(model) == merged
    undo_lora(model)
    assert tensor_hashes(model) == plain
    with pytest.raises(SurgeryError), operation(model, "both"):
        merge_lora(model)
        merge_lora(model)
    assert tensor_hashes(model) == plain
    assert len(lora_log(model).rows) == count + 1
