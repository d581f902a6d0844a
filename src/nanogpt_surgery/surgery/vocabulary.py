"""The vocabulary resized: embeddings, head, tokenizer and config together.

    add tokens      a row more in each table, the mean of rows that are there
    drop tokens     the rows of the tokens that stay, in their order

The tables are the embedding, those of previous tokens, and the head; a head that is tied to the
embedding stays tied. Rows that a model has beyond its tokenizer (a vocabulary padded to a round
number) are given to new tokens first, and go when tokens are dropped.

Legend: B batch, T tokens, V vocabulary before, N vocabulary after.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.tokenizers.resizing import (
    ids_of_tokens,
    with_added_tokens,
    without_unused_tokens,
)
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, vocab_size_of
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.model_history import operation
from nanogpt_surgery.interpret.recording import checked_ids
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.merging import plain_layer
from nanogpt_surgery.model.loss import eval_mode
from nanogpt_surgery.model.precision import computing_in_float32
from nanogpt_surgery.model.quantized import check_not_quantized
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.surgery.operating import Prepared, next_loss, planned, random_ids
from nanogpt_surgery.surgery.structure import check_free, check_in_step, sizes, trains_like

PROBE_TOKENS = 256  # of the texts, where no probe is given
Init: TypeAlias = Literal["pieces", "mean"]
Resized: TypeAlias = tuple[Tokenizer, Report]


@dataclass(frozen=True)
class Resizing:
    """A change of the vocabulary, before it is done.

    Attributes:
        title: in words.
        tokenizer: of after.
        old: for each id of after, the one that it was; −1 for a new token.
        means: for each new id, the old ids whose rows it is the mean of.
        rows: of the report.
    """

    title: str
    tokenizer: Tokenizer
    old: list[int]
    means: Mapping[int, Sequence[int]] = field(default_factory=dict)
    rows: Sequence[dict[str, Any]] = ()


@check_arguments
def add_tokens(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    tokens: Sequence[str],
    *,
    init: Init = "pieces",
    special: bool = False,
    probe: Tensor | None = None,
    plan: bool = False,
) -> Resized:
    """Gives a model and its tokenizer more tokens.

    Args:
        model: changed in place.
        tokenizer: its own; stays as it is.
        tokens: as a text writes them.
        init: a new row is the mean of the rows of the pieces that the token replaces, or of all
            tokens; where there are no pieces, as for a new character, of all.
        special: see `with_added_tokens`.
        probe: ids (B, T) on which the logits of all old ids must stay the same to the bit; random
            ids by default.
        plan: change nothing, and say what it would be.

    Returns:
        The tokenizer with the new tokens, and a report: a row for each token; the sizes before
        and after; how the tables are tied; how much probability the new tokens take.

    Raises:
        SurgeryError: a token cannot be added, an adapter changes a table, the model has hooks or
            is quantised, or a logit is not the same to the bit. The model is untouched then.
    """
    return _resize(model, _adding(model, tokenizer, tokens, init, special), probe, plan)


@check_arguments
def drop_unused_tokens(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    texts: str | Iterable[str],
    *,
    probe: Tensor | None = None,
    plan: bool = False,
) -> Resized:
    """Takes the tokens that some texts do not use out of a model and its tokenizer.

    Args:
        model: changed in place.
        tokenizer: its own; stays as it is. See `without_unused_tokens` for the kinds.
        texts: one text, or several, which are encoded as before, but for the numbers of the ids.
        probe: ids (B, T) of before, on which the logits of all ids that stay must be the same to
            the bit; the beginning of the texts by default.
        plan: change nothing, and say what it would be.

    Returns:
        The tokenizer without them, and a report: how many tokens of each kind stay; the sizes
        before and after; how much probability the dropped ones had.

    Raises:
        SurgeryError: as `add_tokens`, or the probe has an id that is dropped.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    change = _dropping(model, tokenizer, texts)
    if probe is not None:
        return _resize(model, change, probe, plan)
    length = min(PROBE_TOKENS, model.config.block_size)
    probe = torch.tensor([next(ids for t in texts if (ids := tokenizer.encode(t)))[:length]])
    made, report = _resize(model, change, probe, plan)
    measured_on = {"measured_on": f"the first {probe.numel():,} tokens of the texts"}
    return made, Report(report.title, report.rows, report.summary | measured_on)


def _adding(
    model: SimpleGPT, tokenizer: Tokenizer, tokens: Sequence[str], init: Init, special: bool
) -> Resizing:
    if not tokens:
        raise SurgeryError("no token is named")
    made = with_added_tokens(tokenizer, tokens, special)
    ids, there = ids_of_tokens(made.to_json()), vocab_size_of(tokenizer)
    count = max(model.config.vocab_size, vocab_size_of(made))
    new = {token: ids[token] for token in tokens}
    taken = set(new.values())
    old = [-1 if i in taken or i >= model.config.vocab_size else i for i in range(count)]
    pieces = {token: _pieces(tokenizer, token) if init == "pieces" else [] for token in tokens}
    means = {i: pieces[token] or range(there) for token, i in new.items()}
    rows = [
        {
            "token": token,
            "id": i,
            "mean of": " ".join(map(str, pieces[token])) or f"all {there:,}",
        }
        for token, i in new.items()
    ]
    shown = ", ".join(map(repr, tokens[:4])) + (", …" if tokens[4:] else "")
    return Resizing(f"add {len(tokens)} tokens: {shown}", made, old, means, rows)


def _pieces(tokenizer: Tokenizer, token: str) -> list[int]:
    """Returns the ids of the pieces that a new token replaces; none where there are none."""
    try:
        return list(tokenizer.encode(token))
    except SurgeryError:  # a character that was not in the vocabulary
        return []


def _dropping(model: SimpleGPT, tokenizer: Tokenizer, texts: str | Iterable[str]) -> Resizing:
    made, old = without_unused_tokens(tokenizer, texts)
    title = f"drop {model.config.vocab_size - len(old):,} of {model.config.vocab_size:,} tokens"
    return Resizing(title, made, old)


def _prepared(model: SimpleGPT, change: Resizing) -> Prepared:
    check_not_quantized(model, "another vocabulary")
    check_free(model)
    wrapped = [name for name, table in _tables(model) if isinstance(table, LoRALayer)]
    if wrapped:
        raise SurgeryError(
            f"an adapter changes {wrapped[0]}, whose rows would be others",
            "merge_lora(model) or remove_lora(model) first",
        )
    config = replace(model.config, vocab_size=len(change.old))
    names = [name for name, _ in _tables(model)]
    tied = model.lm_head.weight is model.embed_tokens.weight
    summary = {
        "vocabulary_before": model.config.vocab_size,
        "vocabulary_after": len(change.old),
        "tables": ", ".join(names),
        "head": "tied to the embedding, and stays so" if tied else "has a table of its own",
    }
    summary |= sizes(model, config)
    tables = (1 if tied else 2) + model.config.n_prev_tokens
    made = tables * len(change.old) * model.embed_tokens.weight[0].nbytes
    rows = list(change.rows)
    return Prepared(change.title, rows, lambda: _set_tables(model, change), summary, made)


def _tables(model: SimpleGPT) -> Iterator[tuple[str, Any]]:
    """Yields the name and the module of each table with a row for each token."""
    yield "embed_tokens", model.embed_tokens
    previous: Any = model.embed_prev_tokens
    for i in range(model.config.n_prev_tokens):
        yield f"embed_prev_tokens.{i}", previous[i]
    yield "lm_head", model.lm_head


def _resize(model: SimpleGPT, change: Resizing, probe: Tensor | None, plan: bool) -> Resized:
    start, ready = time.perf_counter(), _prepared(model, change)
    old = torch.tensor(change.old)  # (N,)
    stays = torch.nonzero(old >= 0)[:, 0]  # ids of after
    new_ids = torch.full((model.config.vocab_size,), -1)  # (V,)
    new_ids[old[stays]] = stays
    ids = old[stays][random_ids(model).cpu() % len(stays)] if probe is None else probe
    ids = checked_ids(model, ids).cpu()
    gone = ids[new_ids[ids] < 0]
    if len(gone):
        raise SurgeryError(f"the probe has the id {int(gone[0])}, whose token does not stay")
    hidden, logits = _hidden_and_logits(model, ids, old[stays])
    before = _with_head(model, hidden)
    if plan:
        seconds = 2 * (time.perf_counter() - start)
        return change.tokenizer, planned(model, ready, seconds, before.numel())
    with operation(model, ready.title):
        ready.change()
        again, same = _hidden_and_logits(model, new_ids[ids], stays)
        if not (torch.equal(hidden, again) and torch.equal(logits, same)):
            worst = float((logits - same).abs().max())
            raise SurgeryError(
                "the logits of ids that stay are not the same to the bit as before; the largest "
                f"difference is {worst:.3g}"
            )
    after = _with_head(model, again)
    losses = {"loss_before": next_loss(before, ids), "loss_after": next_loss(after, new_ids[ids])}
    effect = _effect(before, after, old, stays) | (losses if ids.size(1) > 1 else {})
    told = {"measured_on": f"{ids.numel()} random tokens"} if probe is None else {}
    return change.tokenizer, Report(ready.title, ready.rows, ready.summary | effect | told)


@torch.no_grad()
def _set_tables(model: SimpleGPT, change: Resizing) -> None:
    """Puts tables with the new rows in the places of the old ones."""
    made: dict[int, nn.Parameter] = {}  # by the old one: a tied head gets the embedding's
    for name, table in list(_tables(model)):
        weight = table.weight
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(_rows(weight, change))
            trains_like(model, [(weight, made[id(weight)])])
        parent, _, child = name.rpartition(".")
        place = model.get_submodule(parent)
        place._modules[child] = _table_like(table, made[id(weight)])
    model.config = replace(model.config, vocab_size=len(change.old))
    check_in_step(model)


def _table_like(table: Any, weight: nn.Parameter) -> nn.Module:
    """Returns an embedding, or a head, with another weight."""
    if isinstance(table, nn.Embedding):
        return plain_layer(table, weight)
    head = nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
    head.weight = weight
    return head.train(table.training)


def _rows(weight: Tensor, change: Resizing) -> Tensor:
    """Returns the rows of a table for the ids of after: (V, C) → (N, C)."""
    rows = weight.detach()[torch.tensor(change.old).clamp_min(0).to(weight.device)]  # (N, C)
    for new, ids in change.means.items():
        pieces = weight.detach()[torch.tensor(list(ids), device=weight.device)]
        rows[new] = pieces.float().mean(0).to(rows.dtype)
    return rows


def _hidden_and_logits(model: SimpleGPT, ids: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the head's input after ids, and the logits of some ids, both in float32.

    Of these alone: a product of another shape may round otherwise in its last digit.
    """
    device = model.embed_tokens.weight.device
    with eval_mode(model), computing_in_float32(model), torch.no_grad():
        hidden = model.hidden(ids.to(device))  # (B, T, C)
        weight = model.lm_head.weight.float()[some.to(device)]
        return hidden.cpu(), F.linear(hidden, weight).cpu()


def _with_head(model: SimpleGPT, hidden: Tensor) -> Tensor:
    """Returns the logits of all ids, (B, T, C) → (B, T, V)."""
    with torch.no_grad():
        weight = model.lm_head.weight.float()
        return F.linear(hidden.to(weight.device), weight).cpu()


def _effect(before: Tensor, after: Tensor, old: Tensor, stays: Tensor) -> dict[str, float]:
    """Returns how far two distributions over different vocabularies are apart.

    The smaller one says nothing of some tokens, so the KL divergence is that from it to the larger
    one: −ln of the share that is not theirs.
    """
    p, q = before.softmax(-1).double(), after.softmax(-1).double()  # (B, T, V), (B, T, N)
    left = p[..., old[stays]].sum(-1) * q[..., stays].sum(-1)  # (B, T); of one of them all is left
    same = old[after.argmax(-1)] == before.argmax(-1)
    return {
        "largest_error": float((after[..., stays] - before[..., old[stays]]).abs().max()),
        "kl": float(-left.clamp(1e-300, 1).log().mean()),
        "probability_of_the_others": float(1 - left.mean()),
        "top_token_unchanged": float(same.double().mean()),
    }
