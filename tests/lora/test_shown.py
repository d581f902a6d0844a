"""What a wrapper shows of the layer inside, to models that read more of a layer than its output."""

import pytest
import torch
from helpers.adapters import attach_adapter
from helpers.builds import MODELS
from helpers.models import randomise, train_a_little
from torch import nn

from nanogpt_surgery import SurgeryError, inject_lora, merge_lora, tensor_hashes, undo_lora
from nanogpt_surgery.lora.several import lora_layers
from nanogpt_surgery.lora.stored_adapter import StoredAdapter
from nanogpt_surgery.training.checks import check_gradients

OF_A_LINEAR = ("weight", "bias", "in_features", "out_features")
OF_AN_EMBEDDING = ("weight", "num_embeddings", "embedding_dim", "padding_idx")


def t5() -> nn.Module:
    """Its feed-forward reads `wo.weight.dtype` before it calls `wo`."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=43, d_model=24, d_kv=10, d_ff=28, num_layers=2, num_heads=3,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(T5ForConditionalGeneration(config).eval())


@pytest.mark.parametrize("targets", [["wo"], ["wo", "shared"], "all-linear"])
def test_a_t5_is_adapted_and_undone(targets):
    model = t5()
    ids = {"input_ids": torch.arange(10).view(2, 5), "decoder_input_ids": torch.ones(2, 3).long()}
    with torch.no_grad():
        first, plain = tensor_hashes(model), model(**ids).logits
        inject_lora(model, targets, rank=2, tied="untie")
        assert torch.equal(model(**ids).logits, plain)
        train_a_little(model)
        adapted = model(**ids).logits
        assert (adapted - plain).abs().max() > 1e-3 * plain.std()
        merge_lora(model)
        torch.testing.assert_close(model(**ids).logits, adapted)
        undo_lora(model)
        assert torch.equal(model(**ids).logits, adapted)
        undo_lora(model)
        assert torch.equal(model(**ids).logits, plain)
    assert tensor_hashes(model) == first


def test_a_wrapper_shows_what_its_layer_is_and_owns_none_of_it():
    model = nn.Sequential(nn.Embedding(7, 5, padding_idx=2), nn.Linear(5, 3))
    bare, names = list(model), set(model.state_dict())
    inject_lora(model, ["0", "1"], rank=2)
    for layer, inside, shown in zip(model, bare, (OF_AN_EMBEDDING, OF_A_LINEAR), strict=True):
        assert all(getattr(layer, name) is getattr(inside, name) for name in shown)
        others = {*OF_A_LINEAR, *OF_AN_EMBEDDING} - {*shown}
        assert not any(hasattr(layer, name) for name in others)
        assert not layer._parameters
        with pytest.raises(SurgeryError, match=f"^weight of a {type(layer).__name__}"):
            layer.weight = nn.Parameter(torch.zeros(1))
    kept = {name.replace("original_layer.", "") for name in model.state_dict()}
    assert {name for name in kept if "updates" not in name} == names


def test_a_module_replaced_whole_shows_the_copy_that_takes_part():
    model = MODELS["SimpleGPT"]()
    attach_adapter(model, StoredAdapter({}, whole={"lm_head.weight": torch.ones(43, 24)}), "whole")
    assert torch.equal(model.lm_head.weight, torch.ones(43, 24))
    lora_layers(model)["lm_head"].enabled = False
    assert model.lm_head.weight is model.lm_head.original_layer.weight


def test_where_a_model_multiplies_by_the_weight_itself_no_gradient_arrives():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.linear(self.called(x), self.read.weight, self.read.bias)

    model = Reader()
    inject_lora(model, ["called", "read"], rank=1)
    model(torch.randn(2, 3)).square().sum().backward()
    with pytest.raises(SurgeryError, match=r"updates: read \(default\)"):
        check_gradients(model)


def test_a_vocabulary_is_not_resized_under_an_adapter():
    """The adapter would have rows for other ids than the table; nothing is half done."""
    model = MODELS["transformers"]()
    inject_lora(model, "embed_tokens", rank=2)
    first = tensor_hashes(model)
    with pytest.raises(TypeError, match="LoRAEmbedding'>, which is not an instance"):
        model.resize_token_embeddings(50)
    assert tensor_hashes(model) == first


@pytest.mark.parametrize("name", ["weight", "bias", "lora_A", "scaling"])
@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(2, 2)), torch.zeros(2, 2), None])
def test_what_a_wrapper_shows_is_not_set_through_it(name, value):
    model = nn.Sequential(nn.Linear(5, 3))
    inject_lora(model, "0", rank=2)
    before = getattr(model[0], name)
    with pytest.raises(SurgeryError, match=rf"^{name} of a LoRALinear.*\n.*remove_lora"):
        setattr(model[0], name, value)
    assert getattr(model[0], name) is before
    assert name not in model[0]._parameters
