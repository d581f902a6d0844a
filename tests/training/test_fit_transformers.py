"""`fit` and `evaluate` on a model of transformers, with an adapter of ours on it."""

import pytest
import torch
from torch import nn

from nanogpt_surgery import FitSettings, GPTDataset, evaluate, fit, inject_lora, tensor_hashes

SETTINGS = FitSettings(
    max_steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=0, device="cpu", compile="off"
)


@pytest.fixture
def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=16,
        bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


DATASET = GPTDataset.from_ids(torch.arange(200) % 23, 9)


def test_its_adapter_learns_and_nothing_else_moves(model: nn.Module) -> None:
    before = tensor_hashes(model)
    inject_lora(model, ["q_proj", "v_proj", "lm_head"], rank=2)
    steps = list(fit(model, DATASET, SETTINGS, validation=DATASET))
    assert steps[-1].loss < steps[0].loss
    assert steps[-1].validation_loss == pytest.approx(evaluate(model, DATASET), rel=1e-5)
    after = tensor_hashes(model)
    frozen = [after.get(name.replace(".weight", ".original_layer.weight"), after.get(name))
              for name in before]  # fmt: skip
    assert frozen == list(before.values())


def test_its_loss_is_the_one_that_it_computes_itself(model: nn.Module) -> None:
    ids = DATASET.ids[:55].view(1, -1)[:, :10].long()  # one window and its last target
    one = GPTDataset.from_ids(ids[0], 9)
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert evaluate(model, one) == pytest.approx(wanted, rel=1e-5)
