"""Documents that share a row are trained on as if each were alone: loss and gradients."""

from dataclasses import replace

import pytest
import torch
from helpers.models import CONFIGS, tiny_model, train_a_little
from torch import Tensor

from nanogpt_surgery import InstructionDataset, SimpleGPT, evaluate, fit, inject_lora
from nanogpt_surgery.data.conversations.instructions import Example
from nanogpt_surgery.model.layout import Layout
from nanogpt_surgery.training.fast.chunked_logits import backward_from_hidden, backward_of_loss
from nanogpt_surgery.training.fast.frozen_prefix import FrozenPrefix

NAMES = ["gpt2", "llama", "qwen3-bias-untied", "learned-rmsnorm-swiglu"]  # learned and rotary
SIZE = 17


def examples() -> list[Example]:
    """Seven answers of unequal length after unequal prompts; three rows of 17 hold them."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for prompt, answer in [(3, 1), (2, 6), (7, 2), (1, 4), (5, 3), (4, 9), (2, 2)]:
        ids = torch.randint(1, 53, (prompt + answer,), generator=draw).tolist()
        made.append(Example(tuple(ids), (False,) * prompt + (True,) * answer))
    return made


def packed() -> tuple[Tensor, ...]:
    dataset = InstructionDataset(examples(), SIZE, pack=True)
    assert len(dataset) == 3
    return next(dataset.iter_all(9))


def gradients(model: SimpleGPT) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def alone(model: SimpleGPT) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the examples one by one, weighted by their trained tokens."""
    total, loss = sum(sum(e.trained[1:]) for e in examples()), 0.0
    for example in examples():
        ids, trained = torch.tensor([example.ids]), torch.tensor([example.trained[1:]])
        targets = torch.where(trained, ids[:, 1:], -100)
        loss += float(backward_of_loss(model, ids[:, :-1], targets, int(trained.sum()) / total))
    return loss, gradients(model)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("most_logits", [2**23, 3 * 53 * 4])
@pytest.mark.parametrize("name", NAMES)
def test_packed_is_the_same_as_alone(name: str, most_logits: int) -> None:
    model = tiny_model(CONFIGS[name])
    loss, wanted = alone(model)
    inputs, targets, documents = packed()
    options = {"most_logits": most_logits, "documents": documents}
    assert float(backward_of_loss(model, inputs, targets, **options)) == pytest.approx(
        loss, rel=1e-6
    )
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize("targets", ["lm_head", r"layers\.1\..*"])
@pytest.mark.parametrize("name", NAMES)
def test_so_it_is_from_states_that_are_kept(name: str, targets: str) -> None:
    model = tiny_model(CONFIGS[name])
    torch.manual_seed(0)
    inject_lora(model, targets, rank=2, tied="untie")
    train_a_little(model)
    loss, wanted = alone(model)
    inputs, goals, documents = packed()
    prefix = FrozenPrefix(model, windows=9)
    for _ in range(2):  # computed, and then kept
        hidden = prefix.hidden(inputs, documents)
        assert float(backward_from_hidden(model, hidden, goals)) == pytest.approx(loss, rel=1e-6)
        assert_same(gradients(model), wanted)
    assert len(prefix.places) == 3


def test_the_same_ids_in_other_documents_are_kept_apart() -> None:
    model = tiny_model(CONFIGS["llama"])
    inject_lora(model, "lm_head", rank=2)
    ids, _, documents = packed()
    prefix = FrozenPrefix(model, windows=9)
    found = [prefix.hidden(ids, cut) for cut in (documents, torch.ones_like(documents), None)]
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    torch.testing.assert_close(found[1], found[2], rtol=1e-5, atol=1e-5)  # one document: the row
    assert len(prefix.places) == 9


def without_mask(documents: Tensor) -> Layout:
    causal = torch.ones(2 * documents.shape[-1:], dtype=torch.bool).tril()
    return Layout(LAYOUT(documents).positions, causal.expand(len(documents), 1, -1, -1))


def without_restart(documents: Tensor) -> Layout:
    columns = torch.arange(documents.size(1)).expand_as(documents)
    return replace(LAYOUT(documents), positions=columns)


LAYOUT = Layout.of_documents


@pytest.mark.parametrize(
    ("name", "broken"),
    [("gpt2", without_mask), ("gpt2", without_restart), ("llama", without_mask)],
)
def test_mask_and_positions_are_both_needed(
    name: str, broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rotary positions distances alone count, so there only the mask does."""
    model = tiny_model(CONFIGS[name])
    loss, _ = alone(model)
    inputs, targets, documents = packed()
    monkeypatch.setattr(Layout, "of_documents", broken)
    found = backward_of_loss(model, inputs, targets, documents=documents)
    assert float(found) != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("targets", ["q_proj", "lm_head"])  # the head: from states that are kept
@pytest.mark.parametrize("accumulation", [1, 3])
def test_fit_on_packed_rows_is_fit_on_the_examples(targets: str, accumulation: int) -> None:
    found = []
    for pack in (True, False):
        model = tiny_model(CONFIGS["llama"])
        torch.manual_seed(0)
        inject_lora(model, targets, rank=2)
        dataset = InstructionDataset(examples(), SIZE, pack=pack)
        parts = accumulation if pack else 1
        size = len(dataset) // parts
        steps = fit(
            model, dataset, batch_size=size, grad_accum_steps=parts, max_steps=3,
            learning_rate=1e-2,
            warmup_steps=0, validation=dataset, evaluate_every=1, device="cpu",
            precision="float32", compile="off",
        )  # fmt: skip
        found.append([(s.loss, s.gradient_norm, s.validation_loss) for s in steps])
        assert found[-1][-1][-1] == pytest.approx(evaluate(model, dataset), rel=1e-6)
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert found[0][-1][0] < found[0][0][0]
