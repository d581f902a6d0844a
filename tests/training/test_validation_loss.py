import pytest
import torch
from helpers.models import FAMILY_CONFIGS, random_ids, tiny_model, train_a_little
from torch import nn

from nanogpt_surgery import GPTDataset, SimpleGPT, evaluate, inject_lora
from nanogpt_surgery.training.fast import accelerate

LLAMA = FAMILY_CONFIGS["llama"]


def naive(model: SimpleGPT, ids: torch.Tensor, length: int) -> float:
    """Every token but the first, predicted once, in float64."""
    model, surprises = model.double(), []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1].long()
            log_probabilities = torch.log_softmax(model(window[None, :-1])[0], -1)
            surprises += [
                -float(row[i]) for row, i in zip(log_probabilities, window[1:], strict=True)
            ]
    assert len(surprises) == len(ids) - 1
    return sum(surprises) / len(surprises)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("count", [8, 15, 22, 23, 28, 60])  # 1 + multiples of 7, and others
def test_evaluate_is_the_mean_over_every_target(count, batch_size):
    ids = random_ids(LLAMA, 1, count)[0]
    dataset = GPTDataset.from_ids(ids.int(), block_size=7)
    expected = naive(tiny_model(LLAMA), ids, 7)
    assert evaluate(tiny_model(LLAMA), dataset, batch_size) == pytest.approx(expected, rel=1e-6)


def test_the_stride_of_the_windows_does_not_matter():
    ids = random_ids(LLAMA, 1, 40)[0]
    losses = {evaluate(tiny_model(LLAMA), GPTDataset.from_ids(ids, 7, stride)) for stride in (1, 3)}
    assert len(losses) == 1


@pytest.mark.parametrize("training", [True, False])
def test_it_is_done_in_eval_mode_and_the_mode_comes_back(training):
    model = SimpleGPT(53, 24, 3, 2, 19, dropout=0.5).train(training)
    dataset = GPTDataset.from_ids(random_ids(model.config, 1, 40)[0], 7)
    within = []
    model.norm.register_forward_hook(
        lambda *_: within.append((model.training, torch.is_grad_enabled()))
    )
    first = evaluate(model, dataset)
    assert all(module.training == training for module in model.modules())
    assert set(within) == {(False, False)}
    assert evaluate(model, dataset) == first


def test_the_mode_comes_back_after_an_error():
    model = SimpleGPT(53, 24, 3, 2, 19).train()
    too_long = GPTDataset.from_ids(random_ids(model.config, 1, 40)[0], 20)
    with pytest.raises(Exception, match="20 tokens exceed"):
        evaluate(model, too_long)
    assert model.training


def test_gradients_and_weights_are_left_alone():
    model = tiny_model(LLAMA)
    dataset = GPTDataset.from_ids(random_ids(LLAMA, 1, 40)[0], 7)
    evaluate(model, dataset)
    assert all(p.grad is None for p in model.parameters())
    model(random_ids(LLAMA, 1, 4)).mean().backward()


def test_an_update_takes_part():
    model = tiny_model(LLAMA)
    dataset = GPTDataset.from_ids(random_ids(LLAMA, 1, 40)[0], 7)
    base = evaluate(model, dataset)
    inject_lora(model, "lm_head")
    assert evaluate(model, dataset) == base
    train_a_little(model)
    assert evaluate(model, dataset) != base


def test_any_model_that_gives_logits_is_evaluated():
    torch.manual_seed(0)
    model = nn.Embedding(11, 11)  # the next token's logits from the last token alone
    ids = torch.randint(11, (30,))
    log_probabilities = torch.log_softmax(model.weight.detach(), -1)[ids[:-1], ids[1:]]
    expected = float(-log_probabilities.mean())
    assert evaluate(model, GPTDataset.from_ids(ids, 4)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_weights_are_cast_where_the_processor_cannot_multiply_them(family, monkeypatch):
    model = tiny_model(FAMILY_CONFIGS[family]).bfloat16()
    data = GPTDataset.from_ids(random_ids(model.config, 1, 200)[0], 11)
    found = {}
    for has_bfloat16 in (True, False):
        monkeypatch.setattr(accelerate, "cpu_has_bfloat16", lambda has=has_bfloat16: has)
        found[has_bfloat16] = evaluate(model, data)
    assert found[False] != found[True] == pytest.approx(found[False], rel=1e-2)
    assert type(model.lm_head) is nn.Linear
    assert found[False] == pytest.approx(evaluate(model.float(), data), rel=1e-6)
