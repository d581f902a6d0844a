"""Norms by hand against autograd on the model's own, and how often a step casts."""

from collections import Counter

import pytest
import torch
from helpers.models import FAMILY_CONFIGS, random_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt_surgery import FitSettings, GPTDataset, SimpleGPT, fit
from nanogpt_surgery.model.transformer_encoder_layer import RMSNorm
from nanogpt_surgery.training.fast.cpu_kernels import cpu_kernels
from nanogpt_surgery.training.fast.norms import QuickRMSNorm


@pytest.mark.parametrize("kinds", [(torch.float64,) * 2, (torch.bfloat16,) * 2,
                                   (torch.bfloat16, torch.float32),
                                   (torch.float32, torch.bfloat16)])  # fmt: skip
def test_the_norm_by_hand_and_its_gradients_are_autograd_s(kinds):
    torch.manual_seed(0)
    own = RMSNorm(7, 1e-3)
    own.weight.data = torch.randn(7, dtype=kinds[1])
    x = (3 * torch.randn(2, 5, 7)).to(kinds[0]).requires_grad_()
    expected = own(x)
    up = torch.randn(2, 5, 7).to(expected.dtype)
    wanted = torch.autograd.grad(expected, (x, own.weight), up)
    own.__class__ = QuickRMSNorm
    found = own(x)
    gradients = torch.autograd.grad(found, (x, own.weight), up)
    bound = 2e-2 if torch.bfloat16 in kinds else 2e-7  # both work in float32
    for ours, theirs in zip((found, *gradients), (expected, *wanted), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= bound * theirs.norm()


class Casts(TorchDispatchMode):
    """Counts how often each shape is cast from float32 to bfloat16 within."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.counts[tuple(out.shape)] += args[0].dtype == torch.float32
        return out


def casts(model: SimpleGPT, **changes: object) -> Counter[tuple[int, ...]]:
    dataset = GPTDataset.from_ids(random_ids(model.config, 1, 100)[0], 9)
    settings = FitSettings(max_steps=1, batch_size=2, device="cpu", precision="bfloat16")
    with Casts() as counted:
        list(fit(model, dataset, settings, examine=False, compile="off", **changes))
    return counted.counts


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_weight_is_cast_once_a_step(checkpointed):
    model = tiny_model(FAMILY_CONFIGS["llama"])
    counts = casts(model, grad_accum_steps=3, gradient_checkpointing=checkpointed)
    shapes = Counter(tuple(p.shape) for p in model.parameters() if p.dim() == 2)
    shapes[tuple(model.embed_tokens.weight.shape)] -= 1 if not model.config.tie_head else 0
    assert {shape: counts[shape] for shape in shapes} == dict(shapes)


def test_what_a_norm_yields_is_cast_once_for_all_its_projections():
    config = FAMILY_CONFIGS["llama"]
    model = tiny_model(config)
    with cpu_kernels(model), torch.autocast("cpu", torch.bfloat16), Casts() as counted:
        model(random_ids(config, 2, 9))
    assert counted.counts[2, 9, config.n_embd] == 2 * config.n_layer + 1


def test_where_a_square_overflows_there_is_no_gradient():
    """As autograd finds none, so that the step is skipped."""
    norm = QuickRMSNorm(16, 1e-5)
    x = torch.full((2, 16), 3e38).index_fill_(0, torch.tensor([1]), 1.0).requires_grad_()
    (gradient,) = torch.autograd.grad(norm(x).sum(), x)
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()
