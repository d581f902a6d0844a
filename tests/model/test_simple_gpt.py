import pytest
import torch
from helpers.models import (
    CONFIGS,
    assert_equal_in_bfloat16,
    assert_equal_logits,
    random_ids,
    tiny_model,
)
from torch import nn

from nanogpt_surgery import GPTConfig, SimpleGPT, SurgeryError

EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def test_the_default_is_the_anatomy_of_gpt2():
    model = SimpleGPT(65)
    config = model.config
    assert (config.n_embd, config.n_head, config.n_layer, config.block_size) == (128, 4, 4, 256)
    assert (config.positions, config.norm, config.mlp) == ("learned", "layernorm", "gelu")
    assert [name for name, _ in model.named_children()] == [
        "embed_tokens",
        "embed_positions",
        "dropout",
        "layers",
        "norm",
        "lm_head",
    ]


@EVERY_CONFIG
def test_called_on_ids_it_gives_logits(config):
    logits = tiny_model(config)(random_ids(config, 3, 7))
    assert logits.shape == (3, 7, config.vocab_size)
    assert logits.dtype == torch.float32


@EVERY_CONFIG
def test_linears_carry_the_names_of_hugging_face(config):
    model = SimpleGPT.from_config(config)
    names = {
        name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    gate = {"gate_proj"} if config.mlp == "swiglu" else set()
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    assert names == projections | gate | {"lm_head"}


@EVERY_CONFIG
@pytest.mark.parametrize("training", [False, True])
def test_a_changed_token_moves_no_earlier_logit(config, training):
    model = tiny_model(config).train(training)
    ids = random_ids(config, 2, 17)
    before = model(ids)
    for place in (1, 8, 16):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1) % config.vocab_size
        after = model(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        moved = (after[:, place:] != before[:, place:]).any(dim=-1)
        assert moved.all(), "a later logit did not see the changed token"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_changed_token_moves_no_earlier_logit_in_a_long_text(family):
    config = GPTConfig.for_family(
        family, vocab_size=31, n_embd=32, n_head=4, n_kv_head=2, n_layer=2, block_size=300
    )
    model = tiny_model(config)
    ids = random_ids(config, 1, 300)
    before = model(ids)
    changed = ids.clone()
    changed[:, 257] = (changed[:, 257] + 1) % config.vocab_size
    after = model(changed)
    assert torch.equal(after[:, :257], before[:, :257])
    assert not torch.equal(after[:, 257:], before[:, 257:])


@EVERY_CONFIG
def test_rows_of_a_batch_are_independent(config):
    model = tiny_model(config)
    ids = random_ids(config, 5, 11)
    together = model(ids)
    for row in range(5):
        assert_equal_logits(model(ids[row : row + 1]), together[row : row + 1])


@EVERY_CONFIG
def test_another_row_moves_no_bit(config):
    model = tiny_model(config)
    ids = random_ids(config, 3, 11)
    changed = ids.clone()
    changed[1] = (changed[1] + 1) % config.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


@EVERY_CONFIG
def test_every_parameter_has_a_gradient(config):
    model = tiny_model(config).train()
    model(random_ids(config, 2, 19)).square().mean().backward()
    # A bias of the keys adds the same to every score of a query, which the softmax ignores.
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in without if not name.endswith("k_proj.bias")] == []


@EVERY_CONFIG
def test_hidden_is_what_the_head_reads(config):
    model = tiny_model(config)
    ids = random_ids(config, 2, 7)
    hidden = model.hidden(ids)
    assert hidden.shape == (2, 7, config.n_embd)
    assert torch.equal(model.lm_head(hidden), model(ids))


def test_dropout_works_in_training_alone():
    config = GPTConfig(31, n_embd=32, dropout=0.3)
    model, ids = tiny_model(config), random_ids(config, 2, 9)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_a_tied_head_is_the_embedding():
    tied, untied = SimpleGPT(31, tie_head=True), SimpleGPT(31)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight


@EVERY_CONFIG
def test_from_config_gives_a_model_of_this_config(config):
    assert SimpleGPT.from_config(config).config == config


def test_a_context_longer_than_block_size_is_refused_with_both_numbers():
    model = SimpleGPT(31, n_embd=16, block_size=8)
    with pytest.raises(SurgeryError, match="9 tokens exceed the model's block_size of 8"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_a_single_row_of_ids_is_refused_with_its_shape():
    with pytest.raises(SurgeryError, match=r"\(5,\).*\n.*ids\[None\]"):
        SimpleGPT(31, n_embd=16)(torch.zeros(5, dtype=torch.long))


def test_an_unknown_axis_is_refused_by_name():
    with pytest.raises(TypeError, match="colour"):
        SimpleGPT(65, colour="blue")


@pytest.mark.parametrize("gradients", [True, False], ids=["with-gradients", "without"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_bfloat16_stays_bfloat16_and_close(family, gradients):
    model = tiny_model(GPTConfig.for_family(family, vocab_size=31, n_embd=32, n_layer=2))
    ids = random_ids(model.config, 2, 9)
    with torch.set_grad_enabled(gradients):
        exact = model(ids)
        assert_equal_in_bfloat16(model.bfloat16()(ids), exact)
