import pytest
import torch
from helpers.builds import HEADS, MODELS, TABLES, close, logits, some_ids
from helpers.models import train_a_little
from torch import nn

from nanogpt_surgery import (
    LoRALinear,
    SurgeryError,
    blend_lora,
    inject_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    undo_lora,
)
from nanogpt_surgery.lora.several import lora_layers

EVERY_PATIENT = pytest.mark.parametrize("patient", MODELS)


def weights(model: nn.Module, patient: str) -> tuple[nn.Parameter, nn.Parameter]:
    head, table = (model.get_submodule(names[patient]) for names in (HEADS, TABLES))
    return head.weight, table.weight


@EVERY_PATIENT
@pytest.mark.parametrize("end", [HEADS, TABLES], ids=["head", "table"])
def test_a_tied_target_is_refused_with_the_reason(patient, end):
    model = MODELS[patient](tied=True)
    with pytest.raises(SurgeryError, match=rf"{end[patient]} with ") as caught:
        inject_lora(model, end[patient])
    assert "tied='untie'" in caught.value.hint
    assert "tied='both'" in caught.value.hint
    if patient != "another":
        inject_lora(model, "all-linear")  # the output layer apart


@EVERY_PATIENT
def test_untied_the_merged_head_has_a_weight_of_its_own(patient):
    model, ids = MODELS[patient](tied=True), some_ids()
    inject_lora(model, HEADS[patient], rank=2, tied="untie")
    train_a_little(model)
    adapted = logits(model, ids)
    old = model.get_submodule(TABLES[patient]).weight.clone()
    merge_lora(model)
    head, table = weights(model, patient)
    assert head is not table
    assert torch.equal(table, old)
    assert close(logits(model, ids), adapted)
    undo_lora(model)
    remove_lora(model)
    head, table = weights(model, patient)
    assert head is table


@EVERY_PATIENT
def test_both_ends_adapted_apart_are_merged_apart(patient):
    model, ids = MODELS[patient](tied=True), some_ids()
    inject_lora(model, [HEADS[patient], TABLES[patient]], rank=2, tied="untie")
    train_a_little(model)
    adapted = logits(model, ids)
    merge_lora(model)
    head, table = weights(model, patient)
    assert head is not table
    assert close(logits(model, ids), adapted)


@EVERY_PATIENT
@pytest.mark.parametrize("end", [HEADS, TABLES], ids=["head", "table"])
def test_both_get_the_same_change_and_stay_tied(patient, end):
    model, ids = MODELS[patient](tied=True), some_ids()
    report = inject_lora(model, end[patient], rank=2, tied="both")
    head, table = (lora_layers(model)[names[patient]] for names in (HEADS, TABLES))
    assert report.summary["trainable_parameters"] == head.lora_A.numel() + head.lora_B.numel()
    train_a_little(model)
    assert torch.equal(head.delta_weight(), table.delta_weight())
    adapted = logits(model, ids)
    merge_lora(model)
    one, other = weights(model, patient)
    assert one is other
    assert close(logits(model, ids), adapted)


def test_both_needs_a_kind_that_has_two_sides():
    model = MODELS["SimpleGPT"](tied=True)
    for kind in ({"dora": True}, {"pissa": True}):
        with pytest.raises(SurgeryError, match="tied='untie'"):
            inject_lora(model, "lm_head", tied="both", **kind)
        assert not lora_layers_of(model)


def lora_layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def test_a_merge_that_would_break_an_undecided_tie_is_refused():
    model = MODELS["SimpleGPT"]()
    inject_lora(model, "lm_head")
    model.embed_tokens.weight = model.lm_head.original_layer.weight  # tied after the injection
    with pytest.raises(SurgeryError, match="lm_head with embed_tokens"):
        merge_lora(model)
    assert lora_layers(model)


@EVERY_PATIENT
@pytest.mark.parametrize("ends", [(HEADS, TABLES), (TABLES, HEADS)], ids=["head", "table"])
def test_what_two_adapters_said_of_one_tie_counts_for_both_its_ends(patient, ends):
    model, ids = MODELS[patient](tied=True), some_ids()
    first, second = ends
    inject_lora(model, first[patient], name="a", rank=2, tied="both")
    inject_lora(model, second[patient], name="b", rank=1, tied="untie")
    train_a_little(model)
    blend_lora(model, {"a": 1.0, "b": 0.5})
    adapted = logits(model, ids)
    merge_lora(model)
    head, table = weights(model, patient)
    assert head is not table
    assert close(logits(model, ids), adapted)


def test_a_module_under_two_names_is_wrapped_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(4, 4)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    model, x = Twice(), torch.randn(2, 4)
    inject_lora(model, "first", rank=2)
    assert model.first is model.second
    train_a_little(model)
    adapted = logits(model, x)
    merge_lora(model)
    assert model.first.weight is model.second.weight
    assert close(logits(model, x), adapted)


@pytest.mark.parametrize("choice", ["untie", "both"])
def test_the_choice_travels_with_the_adapter(choice, tmp_path):
    model, ids = MODELS["SimpleGPT"](tied=True), some_ids()
    inject_lora(model, ["lm_head", "q_proj"], rank=2, tied=choice)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    again = MODELS["SimpleGPT"](tied=True)
    with pytest.raises(SurgeryError, match="lm_head with embed_tokens"):
        load_adapter(again, tmp_path / "adapter", tied="refuse")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again, ids), logits(model, ids))
    merge_lora(again)
    assert (again.lm_head.weight is again.embed_tokens.weight) == (choice == "both")


@pytest.mark.parametrize("choice", ["untie", "both"])
def test_a_merged_transformers_model_is_saved_as_tied_as_it_is(choice, tmp_path):
    from transformers import LlamaForCausalLM

    model, ids = MODELS["transformers"](tied=True), some_ids()
    inject_lora(model, "lm_head", rank=2, tied=choice)
    train_a_little(model, size=0.5)
    merge_lora(model)
    assert model.config.tie_word_embeddings is (choice == "both")
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))
    undo_lora(model)
    assert model.config.tie_word_embeddings is True
