"""The loss over a frozen head and its gradients by hand, against autograd on the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery import LoRALinear, LoRASettings
from nanogpt_surgery.lora.variants import new_update
from nanogpt_surgery.training.fast.frozen_head import backward_of_frozen_head, frozen_head

BATCH, TOKENS, WIDTH, VOCABULARY = 3, 5, 7, 11


def head_of(adapted: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).to(dtype).requires_grad_(False)
    if not adapted:
        return head
    layer = LoRALinear(head, rank=2, alpha=3)
    nn.init.normal_(layer.lora_B)
    return layer


def some(spread: float = 1.0) -> tuple[Tensor, Tensor]:
    hidden = spread * torch.randn(BATCH, TOKENS, WIDTH)
    targets = torch.randint(VOCABULARY, (BATCH, TOKENS))
    targets[0, 1:4] = -100
    targets[2] = -100
    return hidden, targets


@pytest.mark.parametrize(("rows", "in_piece"), [(1, 1), (3, 13), (3, None), (100, 30), (100, None)])
@pytest.mark.parametrize("spread", [1.0, 300.0])
@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_loss_and_gradients_are_autograd_s(adapted, needs, spread, rows, in_piece):
    head = head_of(adapted)
    hidden, targets = some(spread)
    hidden.requires_grad_(needs)
    trained = [p for p in head.parameters() if p.requires_grad]
    inputs = trained + ([hidden] if needs else [])
    plain = 0.3 * F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten())
    wanted = torch.autograd.grad(plain, inputs) if inputs else []
    quick = frozen_head(head, torch.float32)
    assert quick is not None
    found = backward_of_frozen_head(quick, hidden, targets, 0.3, rows * VOCABULARY, in_piece)
    assert float(found) == pytest.approx(plain.item(), rel=1e-5)
    for tensor, gradient in zip(inputs, wanted, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.stride() == tensor.stride()
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-4, atol=1e-5 * spread)


def test_gradients_are_added():
    head, (hidden, targets) = head_of(True), some()
    quick = frozen_head(head, torch.float32)
    backward_of_frozen_head(quick, hidden, targets, 0.25, 40)
    once = {name: p.grad.clone() for name, p in head.named_parameters() if p.requires_grad}
    backward_of_frozen_head(quick, hidden, targets, 0.75, 40)
    for name, gradient in once.items():
        torch.testing.assert_close(head.get_parameter(name).grad, 4 * gradient)


@pytest.mark.parametrize("adapted", [True, False])
def test_a_stored_half_is_computed_in_what_is_asked_for(adapted):
    head, (hidden, targets) = head_of(adapted, torch.bfloat16), some()
    hidden.requires_grad_(True)
    exact = head_of(adapted, torch.bfloat16).float()
    plain = F.cross_entropy(exact(hidden).flatten(0, 1), targets.flatten())
    (wanted,) = torch.autograd.grad(plain, hidden)
    errors = []
    for precision in (torch.float32, torch.bfloat16):
        hidden.grad = None
        quick = frozen_head(head, precision)
        found = backward_of_frozen_head(quick, hidden, targets, 1.0, 40)
        assert float(found) == pytest.approx(
            plain.item(), rel=1e-5 if precision.itemsize == 4 else 1e-2
        )
        errors.append(float((hidden.grad - wanted).norm() / wanted.norm()))
    assert errors[0] < 1e-5 < errors[1] < 2e-2


def test_a_head_that_is_more_is_left_to_autograd():
    linear = nn.Linear(WIDTH, VOCABULARY)
    assert frozen_head(linear, torch.float32) is None  # it learns
    assert frozen_head(linear.requires_grad_(False), torch.float32) is None  # it has a bias
    bare = nn.Linear(WIDTH, VOCABULARY, bias=False)
    layer = LoRALinear(bare, rank=2)
    assert frozen_head(layer, torch.float32) is not None
    watching = [
        layer.register_forward_hook,
        layer.register_full_backward_hook,
        layer.original_layer.register_full_backward_pre_hook,
        layer.lora_A.register_hook,
        layer.lora_B.register_post_accumulate_grad_hook,
    ]
    for watch in watching:
        handle = watch(lambda *_: None)
        assert frozen_head(layer, torch.float32) is None, watch  # somebody watches
        handle.remove()
        assert frozen_head(layer, torch.float32) is not None
    for changes in ({"dora": True}, {"pissa": True}, {"dropout": 0.1}):
        layer.updates["default"] = new_update(bare, LoRASettings(rank=2, **changes))
        assert frozen_head(layer, torch.float32) is None
