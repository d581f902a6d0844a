"""Attention in blocks, and its gradients by hand, against all of it at once in float64."""

import pytest
import torch
from torch import Tensor

from nanogpt_surgery.model.transformer_encoder_layer import causal_attention, repeat_heads
from nanogpt_surgery.training.fast import block_attention as module
from nanogpt_surgery.training.fast.block_attention import block_attention, blocks_of
from nanogpt_surgery.training.fast.cpu_dropout import gain, level_of, random_bits

BATCH, WIDTH = 2, 5
SHAPES = [  # query heads, KV heads, queries, keys
    (6, 2, 13, 13),
    (3, 3, 13, 13),
    (4, 1, 5, 13),
    (2, 2, 1, 13),
    (6, 3, 4, 4),
    (4, 2, 3, 3),
]


@pytest.fixture(params=[(4, 2**19), (4, 40), (100, 2**19)], ids=["", "a head at a time", "one"])
def blocks(request, monkeypatch) -> None:
    """Blocks small enough to have several, of all heads together or of each."""
    monkeypatch.setattr(module, "QUERIES", request.param[0])
    monkeypatch.setattr(module, "IN_CACHE", request.param[1])


def inputs(heads: int, groups: int, queries: int, keys: int) -> list[Tensor]:
    """q, k and v as a model makes them: (B, H, T, D), in memory (B, T, H, D)."""
    torch.manual_seed(0)
    sizes = ((heads, queries), (groups, keys), (groups, keys))
    rows = [torch.randn(BATCH, n, h, WIDTH, dtype=torch.float64) for h, n in sizes]
    return [x.transpose(1, 2).requires_grad_() for x in rows]


def causal(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(BATCH, 1, -1, -1)


def packed(queries: int, keys: int) -> Tensor:
    """Texts that end at other columns in each row."""
    texts = torch.stack([torch.arange(keys) >= keys - 2, torch.arange(keys) % 16 >= 3])
    same = texts[:, None, -queries:, None] == texts[:, None, None, :]
    return causal(queries, keys) & same


def at_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, factors: Tensor) -> Tensor:
    """Softmax-weighted values, each weight times a factor (B, H, T, S)."""
    k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    scores = (q @ k.mT / q.size(3) ** 0.5).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) * factors) @ v


def factors_drawn(q: Tensor, k: Tensor, dropout: float) -> Tensor:
    """What dropout multiplies the weights with, as blocks draw it: (B, H, T, S)."""
    groups, sharing = k.size(1), q.size(1) // k.size(1)
    shape = BATCH * groups, q.size(2), sharing, k.size(2)
    factors = torch.full(shape, gain(dropout), dtype=torch.float64)
    if dropout:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        folded_q = torch.empty(BATCH * groups, q.size(2), sharing, WIDTH)
        for block in blocks_of(folded_q, torch.empty(BATCH * groups, k.size(2), WIDTH)):
            part = factors[block.heads, block.queries, :, block.keys]
            part[random_bits(part.shape, generator) < level_of(dropout)] = 0
    return factors.unflatten(0, (BATCH, groups)).transpose(2, 3).flatten(1, 2)


def gradients(y: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(9)
    return torch.autograd.grad(y, tensors, torch.randn(y.shape, dtype=torch.float64).to(y.dtype))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept_keys", [0, 512])
@pytest.mark.parametrize("dropout", [0.0, 0.375])
@pytest.mark.parametrize("mask_of", [None, packed])
def test_outputs_and_gradients_are_those_of_all_at_once(
    shape, kept_keys, dropout, mask_of, monkeypatch
):
    monkeypatch.setattr(module, "KEPT_KEYS", kept_keys)
    q, k, v = tensors = inputs(*shape)
    mask = None if mask_of is None else mask_of(q.size(2), k.size(2))
    torch.manual_seed(5)
    y = block_attention(q, k, v, dropout, mask)
    torch.manual_seed(5)
    visible = causal(q.size(2), k.size(2)) if mask is None else mask
    expected = at_once(q, k, v, visible, factors_drawn(q, k, dropout))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("kept_keys", [0, 512])
@pytest.mark.parametrize("mask_of", [None, packed])
def test_in_what_it_computes_the_error_is_that_of_rounding(dtype, bound, kept_keys, mask_of,
                                                           monkeypatch):  # fmt: skip
    monkeypatch.setattr(module, "KEPT_KEYS", kept_keys)
    exact = inputs(6, 2, 200, 200)
    mask = None if mask_of is None else mask_of(200, 200)
    rounded = [x.detach().to(dtype).requires_grad_() for x in exact]
    y = block_attention(*rounded, 0.0, mask)
    expected = at_once(*exact, causal(200, 200) if mask is None else mask, torch.ones(()))
    assert y.dtype == dtype
    found = (y, *gradients(y, rounded))
    for ours, theirs in zip(found, (expected, *gradients(expected, exact)), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


def test_in_bfloat16_it_is_as_exact_as_the_formula_in_bfloat16(monkeypatch):
    monkeypatch.setattr(module, "QUERIES", 8)  # the gradients of keys are sums over many blocks
    exact = inputs(6, 2, 200, 200)
    expected = at_once(*exact, causal(200, 200), torch.ones(()))
    wanted = (expected, *gradients(expected, exact))
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    y = block_attention(*rounded)
    plain = at_once(*rounded, causal(200, 200), torch.ones((), dtype=torch.bfloat16))
    ours, theirs = (y, *gradients(y, rounded)), (plain, *gradients(plain, rounded))
    for a, b, c in zip(ours, theirs, wanted, strict=True):
        assert (a.double() - c).norm() < (b.double() - c).norm()


def test_queries_and_keys_in_float32_are_rounded_once():
    q, k, v = (x.detach().float() for x in inputs(4, 2, 70, 70))
    width = q.size(3)
    found = block_attention(q, k, v.bfloat16())
    q_once = ((q * width**-0.5).bfloat16() * width**0.5).double()
    expected = causal_attention(q_once, k.bfloat16().double(), v.bfloat16().double())
    assert (found.double() - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_weights_made_again_are_those_that_would_have_been_kept(dropout, monkeypatch):
    found = []
    for kept_keys in (512, 0):
        monkeypatch.setattr(module, "KEPT_KEYS", kept_keys)
        tensors = [x.detach().bfloat16().requires_grad_() for x in inputs(6, 2, 150, 150)]
        torch.manual_seed(1)
        y = block_attention(*tensors, dropout)
        found.append((y, *gradients(y, tensors)))
    for kept, again in zip(*found, strict=True):
        assert torch.equal(kept, again)


def test_draws_follow_the_generator():
    q, k, v = inputs(4, 2, 9, 9)
    torch.manual_seed(3)
    first, second = block_attention(q, k, v, 0.5), block_attention(q, k, v, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(block_attention(q, k, v, 0.5), first)


@pytest.mark.parametrize("dropout", [1e-6, 0.999999])
def test_probabilities_at_the_ends_give_no_nan(dropout):
    tensors = inputs(4, 2, 70, 70)
    y = block_attention(*tensors, dropout)
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(y, tensors))


def saved_numbers(length: int) -> int:
    """How many numbers autograd keeps of a context."""
    saved = []
    tensors = inputs(4, 2, length, length)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()), lambda x: x):
        block_attention(*tensors)
    return sum(saved)


def test_what_is_kept_of_a_long_context_grows_with_its_length_alone():
    assert saved_numbers(1200) == 2 * saved_numbers(600)
    assert saved_numbers(512) > 2 * saved_numbers(600)  # its weights are kept


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes how many numbers the largest tensor has that anything within makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return out


def test_no_more_scores_than_a_block_row_are_held_at_once():
    length, heads, groups = 4000, 4, 2
    q = torch.randn(groups, length, heads // groups, WIDTH)
    k, v = torch.randn(2, groups, length, WIDTH)
    row = module.QUERIES * (heads // groups) * length  # of one KV head: that is in IN_CACHE
    assert module.IN_CACHE // 2 < row <= module.IN_CACHE
    with Largest() as largest:
        y, kept = module.attend(q, k, v, None, None, 0.0, False)
        module.attend_backward(y, q, k, v, None, None, 0.0, kept)
    assert largest.numbers <= row


@pytest.mark.slow
@pytest.mark.filterwarnings("default:::torch")  # of PyTorch's compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_computes_the_same(dtype):
    tensors = [x.detach().float().requires_grad_() for x in inputs(4, 2, 150, 150)]

    def attended(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        return block_attention(q.sin(), k.cos(), v.to(dtype), dropout).tanh()

    compiled = torch.compile(attended, fullgraph=True)
    y, expected = compiled(*tensors, 0.0), attended(*tensors, 0.0)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    pairs = zip((y, *gradients(y, tensors)), (expected, *gradients(expected, tensors)), strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= bound * theirs.norm()
    dropped = compiled(*tensors, 0.5)
    assert not torch.equal(dropped, y)
    assert all(gradient.isfinite().all() for gradient in gradients(dropped, tensors))
