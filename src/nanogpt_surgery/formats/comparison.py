"""Compares a written file with what it was written from; one that does not agree is not kept."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError, SurgeryWarning
from nanogpt_surgery.formats.tokenizer_comparison import check_tokenizer
from nanogpt_surgery.model.finite import check_finite
from nanogpt_surgery.model.loss import eval_mode, kl_divergence
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report

# How far a number may move, as a share of the largest in its row.
_TOLERANCES = {"F32": 0.0, "F16": 2**-10, "BF16": 2**-8, "Q8_0": 0.6 / 127}
_PROBE = 16


def compare(
    model: SimpleGPT,
    again: SimpleGPT,
    tokenizer: Tokenizer | None,
    tokenizer_again: Tokenizer | None,
    kinds: dict[str, str],
    title: str,
    lost: Collection[str] = (),
) -> Report:
    """Compare every tensor, the logits on probe ids, and the tokenizer on texts for each part.

    Args:
        model: what was written, each tensor in the dtype that it was read in.
        again: what the file holds, in float32.
        tokenizer: what was written.
        tokenizer_again: what the file holds.
        kinds: how each tensor was stored.
        title: of the report.
        lost: parts of the tokenizer that are known not to be carried over, and were said.

    Returns:
        A row for each kind of storage, and the largest error of the logits, the KL divergence and
        the share of unchanged top tokens on probe ids.

    Raises:
        SurgeryError: a tensor moved further than its kind allows, the logits are not finite, or
            the tokenizer encodes otherwise.
    """
    rows = _tensor_rows(model, again, kinds)
    if tokenizer is None:
        warnings.warn(
            "no tokenizer was written: whoever opens the file must bring ids",
            SurgeryWarning,
            stacklevel=8,  # whoever called the function that writes the file
        )
    check_tokenizer(tokenizer, tokenizer_again, lost)
    return Report(title, rows, _logits(model, again))


def check_equal(
    model: SimpleGPT,
    again: SimpleGPT,
    tokenizer: Tokenizer | None,
    tokenizer_again: Tokenizer | None,
) -> None:
    """Refuse unless all tensors have the same bits and the tokenizer encodes alike."""
    ours, theirs = model.state_dict(), again.state_dict()
    wrong = [
        name
        for name, tensor in ours.items()
        if name not in theirs or not _same_bits(tensor, theirs[name])
    ]
    if wrong:
        raise SurgeryError(f"what was written does not read back: {', '.join(wrong[:8])}")
    check_tokenizer(tokenizer, tokenizer_again)


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    left, right = (t.detach().cpu().contiguous().view(torch.uint8) for t in (ours, theirs))
    return torch.equal(left, right)


def _tensor_rows(
    model: SimpleGPT, again: SimpleGPT, kinds: dict[str, str]
) -> list[dict[str, object]]:
    ours, theirs = model.state_dict(), again.state_dict()
    worst: dict[str, list[float]] = {}
    wrong = [f"{name} is missing" for name in ours if name not in theirs]
    for name, kind in kinds.items():
        error = _largest_move(ours[name], theirs[name])
        if not error <= _TOLERANCES[kind] * 1.01 + 2**-24:
            wrong.append(f"{name} moved by {error:.2g} of its row's largest number")
        worst.setdefault(kind, []).append(error)
    if wrong:
        raise SurgeryError(
            f"what was written does not read back: {'; '.join(wrong[:8])}",
            "the weights may be beyond the range of this type; try F32",
        )
    return [
        {"stored as": kind, "tensors": len(errors), "largest error": max(errors)}
        for kind, errors in sorted(worst.items())
    ]


def _largest_move(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    widest = torch.float64 if ours.dtype == torch.float64 else torch.float32
    ours, theirs = ours.detach().to("cpu", widest), theirs.detach().to(widest)
    scale = ours.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return float(((ours - theirs).abs() / scale).max())


def _logits(model: SimpleGPT, again: SimpleGPT) -> dict[str, float]:
    draw = torch.Generator().manual_seed(0)
    length = min(_PROBE, model.config.block_size)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=draw)
    device = model.embed_tokens.weight.device
    with eval_mode(model), torch.no_grad(), computing_in_float32(model):
        ours = model(ids.to(device)).cpu()
        theirs = again(ids).float()
    with computing_in_float32(model):
        check_finite(ours, model, lambda: model(ids.to(device)))
    check_finite(theirs, again, lambda: again(ids), "the written model")
    return {
        "largest_logit_error": float((ours - theirs).abs().max()),
        "kl_divergence": float(kl_divergence(ours, theirs)),
        "top_token_unchanged": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Lets a model of any dtypes compute in float32, each part widened only while it runs."""
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(part: nn.Module, _: object) -> None:
        for parameter in part.parameters(recurse=False):
            narrow[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def give_back(part: nn.Module, _: object, __: object) -> None:
        for parameter in part.parameters(recurse=False):
            parameter.data = narrow.pop(parameter)

    handles = []
    for part in model.modules():
        handles.append(part.register_forward_pre_hook(widen))
        handles.append(part.register_forward_hook(give_back, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
