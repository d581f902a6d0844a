import pytest
import torch
from helpers.models import FAMILY_CONFIGS, random_ids, tiny_model, train_a_little
from torch import Tensor, nn

from nanogpt_surgery import GPTDataset, SimpleGPT, evaluate, inject_lora, lora_rows
from nanogpt_surgery.model.loss import cross_entropy
from nanogpt_surgery.training.fast import chunked_logits as loss_module
from nanogpt_surgery.training.fast.chunked_logits import backward_of_loss

NAMES = ["gpt2", "gpt2-gelu-untied", "llama"]


def trainings() -> dict[str, object]:
    return {
        "everything": lambda model: None,
        "head": lambda model: inject_lora(model, "lm_head", rank=2, tied="untie"),
        "q and v": lambda model: inject_lora(model, rank=2),
        "both": lambda model: inject_lora(model, ["v_proj", "lm_head"], rank=2, tied="untie"),
    }


def prepared(name: str, prepare) -> tuple[SimpleGPT, Tensor, Tensor]:
    torch.manual_seed(0)
    model = tiny_model(FAMILY_CONFIGS[name])
    prepare(model)
    train_a_little(model)
    ids = random_ids(model.config, 3, 12)
    return model, ids[:, :-1], ids[:, 1:]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("prepare", trainings().values(), ids=trainings())
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positions", [1, 4, 11])
def test_in_parts_it_is_the_whole(name, prepare, positions):
    model, inputs, targets = prepared(name, prepare)
    whole = 0.5 * cross_entropy(model(inputs), targets)
    whole.backward()
    wanted = gradients(model)
    model.zero_grad()
    most = positions * 3 * model.config.vocab_size
    found = backward_of_loss(model, inputs, targets, 0.5, most_logits=most)
    assert float(found) == pytest.approx(whole.item(), rel=1e-6)
    assert gradients(model).keys() == wanted.keys()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-6)


def test_the_logits_are_never_all_there(monkeypatch):
    model, inputs, targets = prepared("llama", lambda model: None)
    shapes = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))
    backward_of_loss(model, inputs, targets, most_logits=4 * 3 * 53)
    assert shapes == [(1, 12, 53), (1, 12, 53), (1, 9, 53)]
    shapes.clear()
    monkeypatch.setattr(loss_module, "MOST_LOGITS", 2 * 2 * 53)
    data = GPTDataset.from_ids(random_ids(model.config, 1, 23)[0], block_size=11)
    found = evaluate(model, data)
    assert max(shape[0] * shape[1] for shape in shapes) <= 4
    monkeypatch.setattr(loss_module, "MOST_LOGITS", 2**23)
    assert evaluate(model, data) == pytest.approx(found, rel=1e-6)


def masked(targets: Tensor, share: float) -> Tensor:
    """Targets of which a share, scattered over all rows, is not trained on."""
    draw = torch.Generator().manual_seed(1)
    return targets.masked_fill(torch.rand(targets.shape, generator=draw) < share, -100)


@pytest.mark.parametrize("prepare", trainings().values(), ids=trainings())
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_where_nothing_is_trained_on_no_logits_are_made(prepare, share):
    model, inputs, targets = prepared("llama", prepare)
    targets = masked(targets, share)
    whole = 0.5 * cross_entropy(model(inputs), targets)
    whole.backward()
    wanted = gradients(model)
    model.zero_grad()
    made = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: made.append(out.shape[:-1].numel()))
    found = backward_of_loss(model, inputs, targets, 0.5, most_logits=7 * 53)
    assert sum(made) == (targets != -100).sum() < targets.numel()
    assert float(found) == pytest.approx(whole.item(), rel=1e-6)
    assert gradients(model).keys() == wanted.keys()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-6)


def test_an_evaluation_makes_no_logits_that_do_not_count():
    model, inputs, targets = prepared("llama", lambda model: None)
    targets = masked(targets, 0.6)
    wanted, made = cross_entropy(model(inputs), targets).item(), []
    model.lm_head.register_forward_hook(lambda _m, _i, out: made.append(out.shape[:-1].numel()))
    found = loss_module.summed_loss(model, (inputs, targets)).item()
    assert sum(made) == (targets != -100).sum()
    assert found / sum(made) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("prepare", trainings().values(), ids=trainings())
@pytest.mark.parametrize("most", [1, 2**23])
def test_a_batch_without_a_target_adds_nothing(prepare, most):
    model, inputs, targets = prepared("llama", prepare)
    nothing = torch.full_like(targets, -100)
    assert backward_of_loss(model, inputs, nothing, most_logits=most) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_window_without_a_target_adds_nothing():
    model, inputs, targets = prepared("llama", lambda model: None)
    assert loss_module.summed_loss(model, (inputs, masked(targets, 2.0))) == 0


def test_gradients_are_added_to_those_that_are_there():
    model, inputs, targets = prepared("llama", lambda model: None)
    backward_of_loss(model, inputs, targets, 0.25, most_logits=200)
    once = gradients(model)
    backward_of_loss(model, inputs, targets, 0.75, most_logits=200)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 4 * once[key], rtol=1e-4, atol=1e-6)


def test_rows_with_adapters_of_their_own_stay_rows():
    model, inputs, targets = prepared("llama", lambda model: inject_lora(model, "lm_head", rank=2))
    with lora_rows(model, ["default", None, "default"]):
        whole = cross_entropy(model(inputs), targets).item()
        found = backward_of_loss(model, inputs, targets, most_logits=400)
        assert float(found) == pytest.approx(whole)


def test_any_other_module_is_called_as_it_is():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    ids = torch.arange(8).view(2, 4)
    found = backward_of_loss(model, ids, ids, most_logits=1)
    assert float(found) == pytest.approx(cross_entropy(model(ids), ids).item())
    assert all(parameter.grad is not None for parameter in model.parameters())
