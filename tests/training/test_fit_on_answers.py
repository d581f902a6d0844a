"""Training where only some targets count: weighted by token, whatever way a batch is cut."""

import pytest
import torch

from nanogpt_surgery import (
    FitSettings,
    InstructionDataset,
    SimpleGPT,
    SurgeryError,
    evaluate,
    fit,
    inject_lora,
)
from nanogpt_surgery.data.conversations.instructions import Example
from nanogpt_surgery.training.fast.chunked_logits import backward_of_loss


def examples() -> list[Example]:
    """Five answers of unequal length at the end of unequal prompts."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for prompt, answer in [(3, 1), (2, 6), (7, 2), (1, 4), (5, 3)]:
        ids = torch.randint(1, 23, (prompt + answer,), generator=draw).tolist()
        made.append(Example(ids, [False] * prompt + [True] * answer))
    return made


def model() -> SimpleGPT:
    torch.manual_seed(1)
    return SimpleGPT(23, n_embd=12, n_head=3, n_layer=2, block_size=11)


def gradients(most_logits: int) -> list[torch.Tensor]:
    network, dataset = model(), InstructionDataset(examples(), 11)
    inputs, targets = (
        torch.stack(rows) for rows in zip(*(dataset[i] for i in range(5)), strict=True)
    )
    backward_of_loss(network, inputs, targets, most_logits=most_logits)
    return [p.grad for p in network.parameters() if p.grad is not None]


def test_a_loss_in_parts_is_the_whole_loss() -> None:
    whole, parts = gradients(10**9), gradients(5 * 23 * 2)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_accumulation_is_the_big_batch() -> None:
    def trained(batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
        network = model()
        dataset = InstructionDataset(examples(), 11)
        options = {"max_steps": 2, "precision": "float32", "device": "cpu", "compile": "off"}
        list(fit(network, dataset, batch_size=batch_size, grad_accum_steps=accumulation, **options))
        return network.state_dict()

    big, small = trained(4, 1), trained(1, 4)
    for name in big:
        if name.endswith("k_proj.bias"):
            continue  # its gradient is zero but for rounding, which Adam's step divides away
        torch.testing.assert_close(big[name], small[name], rtol=1e-4, atol=1e-6)


def test_a_model_that_cannot_keep_documents_apart_is_refused() -> None:
    packed, other = InstructionDataset(examples(), 11, pack=True), torch.nn.Embedding(23, 23)
    for train in (fit, evaluate):
        with pytest.raises(SurgeryError, match="pack=False"):
            train(other, packed)
    assert len(list(fit(other, InstructionDataset(examples(), 11), max_steps=2))) == 2


@pytest.mark.parametrize("adapted", [False, True])
def test_float16_is_refused_before_anything_is_computed(adapted: bool) -> None:
    network = model().half()
    if adapted:
        inject_lora(network, "q_proj")
    with pytest.raises(SurgeryError, match=r"float16.*\n.*model\.float\(\)"):
        fit(network, InstructionDataset(examples(), 11), precision="bfloat16")


def test_a_step_tells_what_is_trained_on_from_what_is_read() -> None:
    dataset = InstructionDataset(examples(), 11)
    [step] = fit(model(), dataset, max_steps=1, batch_size=3, device="cpu", compile="off")
    assert step.tokens == 3 * 11
    assert step.trained_tokens == int((dataset.batch(0, 3, FitSettings().seed)[1] != -100).sum())
    assert 0 < step.trained_tokens < step.tokens


@pytest.mark.parametrize("pack", [False, True])
def test_evaluate_counts_what_is_trained_on_alone(pack: bool) -> None:
    network = model()
    total, count = 0.0, 0
    for example in examples():
        with torch.no_grad():
            scores = network(torch.tensor([example.ids[:-1]]))[0].log_softmax(-1)
        for position, index in enumerate(example.ids[1:]):
            if example.trained[position + 1]:
                total, count = total - float(scores[position, index]), count + 1
    dataset = InstructionDataset(examples(), 11, pack=pack)
    assert evaluate(network, dataset, batch_size=2) == pytest.approx(total / count, rel=1e-6)


class Prompts:
    """Rows in which nothing is trained on."""

    def iter_all(self, batch_size: int):
        yield torch.ones(2, 5, dtype=torch.long), torch.full((2, 5), -100)


def test_where_nothing_is_trained_on_there_is_no_loss() -> None:
    [(inputs, targets)] = Prompts().iter_all(2)
    assert backward_of_loss(model(), inputs, targets, most_logits=30) == 0
    with pytest.raises(SurgeryError, match="evaluate_tokens=0"):
        evaluate(model(), Prompts())
