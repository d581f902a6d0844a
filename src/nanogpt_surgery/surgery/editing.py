"""Editing a fact: Rank-One Model Editing (ROME, arXiv:2202.05262).

A feed-forward's `down_proj` is taken for a memory: the key is its input at the subject's last
token, the value what it gives there. The edit is the ΔW of rank one that gives another value for
this key and, of all that do, disturbs the other keys least:

    ΔW = δ (C⁻¹ k)ᵀ / (C⁻¹ k)ᵀ k     k  the key, the mean over several beginnings of the text
                                     C  the mean of k kᵀ over a text, or over the model's own
                                     δ  what the value has to be moved by

δ is found by gradient descent on the target's loss, with a KL term that keeps what the model says
of "{subject} is a"; it is at most 1.5 times as long as the value. The layer is, unless named, the
one at a quarter of the depth: facts are called up by the feed-forwards of early middle layers
(section 2 there), and where exactly a causal trace sees them says little about where an edit works
(arXiv:2301.04213). The edit is an adapter like any other.

Legend: B batch, T tokens, C width, I width in the feed-forward, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, prompt_ids
from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.history.model_history import UPDATES, operation, plain_name, tensor_hash
from nanogpt_surgery.interpret.recording import checked_ids, record
from nanogpt_surgery.lora.merging import logits_of, merge_lora
from nanogpt_surgery.lora.several import check_new_name
from nanogpt_surgery.lora.stored_adapter import LowRankUpdate, StoredAdapter, attach_adapter
from nanogpt_surgery.model.kv_cache import KVCache
from nanogpt_surgery.model.loss import cross_entropy, eval_mode, kl_divergence
from nanogpt_surgery.model.precision import computing_in_float32
from nanogpt_surgery.model.quantized import check_not_quantized
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.surgery.operating import (
    COMPARING,
    FLOAT32,
    costs,
    effect_on_logits,
    hash_seconds,
    pass_seconds,
    random_ids,
)
from nanogpt_surgery.surgery.structure import check_free

BEGINNINGS = 8  # texts before the prompt, beside none
BEGINNING = 8  # tokens of each
STATISTICS = 2048  # tokens of the model's own text
MOST_STATISTICS = 16_384  # of a text that is given
NEIGHBOURS = 5
ROWS = 32  # that are made, or looked at, together
RIDGE = 0.02  # of the mean of C's diagonal, added to it: a short text does not fill C
STEPS, RATE, SAID = 30, 0.3, 0.05  # the last: a loss at which the target is said
ROSE = 1.01  # times the target's probability before: less is no rise
KL_WEIGHT, DECAY = 0.0625, 0.1
STATISTICS_BYTES = 32  # for each number of C: C in float32, and what solves for it in float64
LONGEST = 1.5  # ‖δ‖ at most, beside ‖value‖


@check_arguments
def edit(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    prompt: str,
    subject: str,
    target: str,
    name: str = "edit",
    *,
    layer: int | None = None,
    text: str | None = None,
    neighbours: Sequence[str] | None = None,
    seed: int = 0,
    probe: Tensor | None = None,
    merge: bool = False,
    plan: bool = False,
) -> Report:
    """Puts an adapter on a model that makes it end a prompt about a subject with the target.

    Args:
        model: changed in place; adapters that it carries wait. Of any dtype: the edit is computed
            in float32.
        tokenizer: the model's.
        prompt: with {} in the place of the subject.
        subject: whose fact is edited.
        target: how the prompt is to go on, usually with a space first.
        name: of the adapter.
        layer: whose `down_proj` changes; by default that at a quarter of the depth.
        text: for the key statistics; by default the model's own, 2,048 tokens of it.
        neighbours: prompts to be answered as before; by default about what the model itself finds
            likeliest in the subject's place.
        seed: of the model's own text.
        probe: ids (B, T) to measure the effect on; by default some of the statistics' text.
        merge: put ΔW into the weight, in the same step; adapters leave then.
        plan: change nothing, and say what it would be; one short pass is computed.

    Returns:
        A row for the prompt and each neighbour: answer and target's probability, before and after.
        Where the statistics are from, their hash, and the effect on the probe.

    Raises:
        SurgeryError: a part is empty or ends within a token, no such layer is there, the model is
            quantised or hooks are on it, or the target has not become likelier. The model is
            untouched then.
    """
    fact, layer = Fact(prompt, subject, target), _checked(model, name, layer)
    title = f"edit {fact.text!r} → {target!r} as {name}"
    if plan:
        return _planned(model, tokenizer, fact, layer, title, text)
    return _edited(model, tokenizer, fact, layer, title, name, merge, text, neighbours, seed, probe)


def _edited(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    fact: Fact,
    layer: int,
    title: str,
    name: str,
    merge: bool,
    text: str | None,
    neighbours: Sequence[str] | None,
    seed: int,
    probe: Tensor | None,
) -> Report:
    bare, path = _bare(model), _path(layer)
    ids, source = _statistics_text(bare, tokenizer, text, seed)
    facts = sentences(tokenizer, fact, _beginnings(tokenizer, fact, ids))
    near = neighbours if neighbours is not None else _neighbours(bare, tokenizer, fact)
    seen = _Seen(bare, tokenizer, facts, [fact.text, *near], ids if probe is None else probe)
    covariance = key_statistics(bare, layer, ids)
    a, b = _factors(bare, tokenizer, layer, fact, facts, covariance)
    with operation(model, title):
        attach_adapter(model, StoredAdapter({path: LowRankUpdate(a, b, alpha=1.0)}), name)
        if merge:
            merge_lora(model)
        seen.check(model)
    where = {"layer": path, "statistics": source, "statistics_sha256": tensor_hash(covariance)}
    if probe is None:
        where["measured_on"] = f"{seen.text.numel()} tokens of the statistics' text"
    return Report(title, seen.rows(), where | seen.summary())


def _planned(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    fact: Fact,
    layer: int,
    title: str,
    text: str | None,
) -> Report:
    """Returns what an edit would be; its time is that of as many tokens as it computes."""
    facts, inner = sentences(tokenizer, fact, [""]), model.config.n_inner
    width, count = model.config.n_embd, len(model.layers)
    given = 0 if text is None else min(MOST_STATISTICS, len(tokenizer.encode(text)))
    statistics = given or 2 * STATISTICS  # its own text is said, too
    rows = (BEGINNINGS + 1) * (facts.ids.size(1) + BEGINNING)
    learning = 3 * STEPS * rows * (count - layer) // count  # a backward pass is two forward ones
    tokens = statistics + rows + learning + 2 * (NEIGHBOURS * facts.ids.size(1) + 256)
    seconds = pass_seconds(model, random_ids(model), tokens) + hash_seconds(model)
    size = STATISTICS_BYTES * inner * inner + COMPARING * 256 * model.config.vocab_size
    size += sum(FLOAT32 * p.numel() for p in model.parameters() if p.dtype != torch.float32)
    row = {"layer": _path(layer), "in": inner, "out": width, "rank": 1, "parameters": inner + width}
    summary = {
        "prompt": fact.text,
        "target": fact.target,
        "target tokens": int((facts.targets >= 0).sum()),
        "adapter_bytes": FLOAT32 * (inner + width),
        "steps": STEPS,
    }
    return Report(f"planned: {title}", [row], summary | costs(model, size, seconds))


def _bare(model: SimpleGPT) -> SimpleGPT:
    """Returns a model of the same tensors, in float32 and without adapters."""
    state = {plain_name(n): t for n, t in model.state_dict().items() if UPDATES not in f".{n}"}
    with torch.device("meta"):
        bare = SimpleGPT.from_config(model.config)
    wide = {t.data_ptr(): t.detach().float() for t in state.values()}  # a tied tensor once
    bare.load_state_dict({name: wide[t.data_ptr()] for name, t in state.items()}, assign=True)
    return bare.requires_grad_(False)


def _path(layer: int) -> str:
    return f"layers.{layer}.mlp.down_proj"


def _checked(model: SimpleGPT, name: str, layer: int | None) -> int:
    """Returns the number of the layer to edit."""
    check_new_name(model, name)
    check_not_quantized(model, "edit")
    check_free(model)
    count = model.config.n_layer
    if layer is not None and not 0 <= layer < count:
        raise SurgeryError(f"there is no layer {layer}; they are 0 to {count - 1}")
    return count // 4 if layer is None else layer


@dataclass(frozen=True)
class Fact:
    """A statement about a subject, with another end."""

    prompt: str
    """with {} in the place of the subject"""
    subject: str
    target: str
    """how the text is to go on; it usually begins with a space"""

    def __post_init__(self) -> None:
        if self.prompt.count("{}") != 1:
            raise SurgeryError(
                f"the prompt {quoted(self.prompt)} has {self.prompt.count('{}')} times {{}}, not 1",
                'the subject stands there: "The capital of {} is"',
            )
        if not self.subject.strip() or not self.target:
            raise SurgeryError("the subject or the target is empty")

    @property
    def text(self) -> str:
        """The prompt about the subject."""
        return self.prompt.replace("{}", self.subject)


def split_ids(tokenizer: Tokenizer, start: str, end: str, what: str) -> tuple[list[int], list[int]]:
    """Returns the ids of a text, in two parts.

    Raises:
        SurgeryError: a token lies across the place where the second begins.
    """
    first, both = prompt_ids(tokenizer, start), prompt_ids(tokenizer, start + end)
    if both[: len(first)] != first or not first:
        raise SurgeryError(
            f"{what} does not end where a token ends: {quoted((start + end)[-80:])}",
            "let what follows begin with a space",
        )
    return first, both[len(first) :]


@dataclass(frozen=True)
class Sentences:
    """Texts of ids, filled up on the right, which no earlier token sees, with places in them."""

    ids: Tensor
    """(B, T)"""
    subjects: Tensor
    """(B,): the position of the subject's last token"""
    targets: Tensor
    """(B, T): the next id where the target is to be said, elsewhere −100"""


def sentences(tokenizer: Tokenizer, fact: Fact, beginnings: Sequence[str]) -> Sentences:
    """Returns the fact after each of some beginnings, target included."""
    rows: list[tuple[list[int], int, int]] = []
    before, after = fact.prompt.split("{}")
    for begin in beginnings:
        subject, _ = split_ids(tokenizer, begin + before + fact.subject, after, "the subject")
        prompt, target = split_ids(tokenizer, begin + fact.text, fact.target, "the prompt")
        rows.append((prompt + target, len(subject) - 1, len(prompt)))
    longest = max(len(ids) for ids, _, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full((len(rows), longest), -100)
    for row, (text, _, asked) in enumerate(rows):
        ids[row, : len(text)] = torch.tensor(text)
        targets[row, asked - 1 : len(text) - 1] = ids[row, asked : len(text)]
    return Sentences(ids, torch.tensor([subject for _, subject, _ in rows]), targets)


@torch.no_grad()
def own_text(model: SimpleGPT, tokens: int, seed: int) -> Tensor:
    """Returns ids (B, T) that a model says by itself, each row after an id drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    length = min(model.config.block_size, max(2, tokens // ROWS))
    cache = KVCache(model.config, ROWS, length, torch.float32)
    new = torch.randint(model.config.vocab_size, (ROWS, 1), generator=draw)
    said = [new]
    with eval_mode(model):
        while len(said) < length:
            shares = model(new, cache)[:, -1].float().softmax(-1)  # (B, V)
            new = torch.multinomial(shares, 1, generator=draw)
            said.append(new)
    return torch.cat(said, 1)


@torch.no_grad()
def key_statistics(model: SimpleGPT, layer: int, ids: Tensor) -> Tensor:
    """Returns the mean of k kᵀ over all tokens of ids (B, T) but each row's first, (I, I)."""
    point, total, count = f"layers.{layer}.neurons", torch.zeros(()), 0
    for rows in ids.split(max(1, 2048 // ids.size(1))):
        with eval_mode(model), record(model, point) as found:
            model(rows)
        keys = found[point][:, 1:].flatten(0, 1).float()  # (N, I)
        total, count = total + keys.mT @ keys, count + len(keys)
    return total / count


@dataclass(frozen=True)
class Memory:
    """The inputs of a layer's `down_proj` at the subject's last token, and its output there."""

    keys: Tensor
    """(B, I), after each beginning"""
    value: Tensor
    """(C,), after no beginning"""


@torch.no_grad()
def memory_of(model: SimpleGPT, layer: int, facts: Sentences) -> Memory:
    """Returns the keys and the value of a fact."""
    neurons, value = f"layers.{layer}.neurons", f"layers.{layer}.mlp"
    with eval_mode(model), record(model, [neurons, value]) as found:
        model(facts.ids)
    rows = torch.arange(len(facts.ids))
    keys = found[neurons][rows, facts.subjects].float()  # (B, I)
    return Memory(keys, found[value][0, facts.subjects[0]].float())


def change_of_value(
    model: SimpleGPT, layer: int, facts: Sentences, essence: Sentences, longest: float
) -> Tensor:
    """Returns δ (C,) by which the value has to move for the target to be said.

    The blocks up to the layer are computed once: δ goes into the residual stream behind it.
    """
    with torch.no_grad(), eval_mode(model):
        point = f"layers.{layer}.residual"
        with record(model, point) as found:
            model(facts.ids)
        stream = found[point]
        with record(model, point) as found:
            kept = model(essence.ids)[:, -1]  # (1, V)
        stream_kept = found[point]
    delta = torch.zeros(model.config.n_embd, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=RATE * longest / model.config.n_embd**0.5)
    with eval_mode(model):
        for _ in range(STEPS):
            said = _rest(model, layer, facts.ids, _moved(stream, facts, delta))
            loss = cross_entropy(said, facts.targets)
            if float(loss.detach()) < SAID:
                break
            now = _rest(model, layer, essence.ids, _moved(stream_kept, essence, delta))[:, -1]
            loss = loss + KL_WEIGHT * kl_divergence(kept, now).float()
            loss = loss + DECAY * (delta / longest).square().sum()
            [delta.grad] = torch.autograd.grad(loss, [delta])
            optimizer.step()
            with torch.no_grad():
                delta *= (longest / delta.norm().clamp_min(1e-30)).clamp_max(1)
    return delta.detach()


def _moved(stream: Tensor, facts: Sentences, delta: Tensor) -> Tensor:
    """Returns the residual stream with δ added at the subject's last token."""
    at = torch.zeros(stream.shape[:2]).to(stream)
    at[torch.arange(len(stream)), facts.subjects] = 1
    return stream + at[..., None] * delta.to(stream)  # (B, T, C)


def _rest(model: SimpleGPT, layer: int, ids: Tensor, x: Tensor) -> Tensor:
    """Returns the logits that follow from the residual stream behind a layer."""
    positions = torch.arange(ids.size(1), device=ids.device)
    _, rotation = model.embed(ids, positions)
    for block in model.layers[layer + 1 :]:
        x = block(x, rotation)
    logits: Tensor = model.lm_head(model.norm(x))
    return logits


def rank_one(covariance: Tensor, keys: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Returns A (1, I) and B (C, 1) of the ΔW that moves the first key's value by δ."""
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    u = torch.linalg.solve((covariance + ridge).double(), keys.mean(0).double())  # (I,)
    return (u / (u @ keys[0].double())).float()[None], delta[:, None]


def _factors(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    layer: int,
    fact: Fact,
    facts: Sentences,
    covariance: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns A (1, I) and B (C, 1) of the edit."""
    essence = sentences(tokenizer, Fact("{} is", fact.subject, " a"), [""])
    memory = memory_of(model, layer, facts)
    longest = LONGEST * float(memory.value.norm())
    delta = change_of_value(model, layer, facts, essence, longest)
    return rank_one(covariance, memory.keys, delta)


def _statistics_text(
    model: SimpleGPT, tokenizer: Tokenizer, text: str | None, seed: int
) -> tuple[Tensor, str]:
    """Returns ids (B, T) of the text, and what they are, in words."""
    if text is None:
        ids = own_text(model, STATISTICS, seed)
        return ids, f"{ids.numel():,} tokens of the model's own text, seed {seed}"
    length = min(MOST_STATISTICS // ROWS, model.config.block_size)
    encoded = list(tokenizer.encode(text))[:MOST_STATISTICS]
    length = min(length, len(encoded))
    if length < BEGINNING:
        raise SurgeryError(f"the text has {length} tokens; key statistics need many more")
    rows = len(encoded) // length
    ids = checked_ids(model, torch.tensor(encoded[: rows * length]).view(rows, length))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return ids, f"{ids.numel():,} tokens of the text with the sha256 {digest}"


def _beginnings(tokenizer: Tokenizer, fact: Fact, ids: Tensor) -> list[str]:
    """Returns what may stand before the fact: nothing, and pieces of a text that can be encoded."""
    found = [""]
    for row in ids[:BEGINNINGS]:
        begin = f"{tokenizer.decode(row[1 : 1 + BEGINNING].tolist())}. "
        with suppress(SurgeryError):
            sentences(tokenizer, fact, [begin])
            found.append(begin)
    return found


@torch.no_grad()
def _neighbours(model: SimpleGPT, tokenizer: Tokenizer, fact: Fact) -> list[str]:
    """Returns the prompt about what the model finds likeliest in the subject's place."""
    before = prompt_ids(tokenizer, fact.prompt.split("{}")[0].rstrip())
    if not before:
        return []
    likely = logits_of(model, torch.tensor([before]))[0, -1].argsort(descending=True)[:200]
    words = [tokenizer.decode([index]).strip() for index in likely.tolist()]
    kind = fact.subject[0].isupper()
    alike = [w for w in words if w.isalpha() and len(w) > 2 and w[0].isupper() == kind]
    others = [word for word in dict.fromkeys(alike) if word not in fact.subject]
    return [fact.prompt.replace("{}", word) for word in others[:NEIGHBOURS]]


class _Seen:
    """The answers of a model before an edit and after it."""

    def __init__(
        self,
        model: SimpleGPT,
        tokenizer: Tokenizer,
        facts: Sentences,
        prompts: Sequence[str],
        text: Tensor,
    ):
        self.tokenizer, self.facts, self.prompts = tokenizer, facts, prompts
        self.text = text[:4, :64]  # as much as a probe has
        self.before = self.after = self._measured(model)

    def _measured(self, model: SimpleGPT) -> tuple[list[Tensor], float, Tensor]:
        """Returns the shares of the next tokens, the target's probability, and a text's logits."""
        rows = [torch.tensor([prompt_ids(self.tokenizer, prompt)]) for prompt in self.prompts]
        with computing_in_float32(model):
            shares = [logits_of(model, row)[0, -1].softmax(-1) for row in rows]
            logits = logits_of(model, self.facts.ids[:1])
            loss = cross_entropy(logits, self.facts.targets[:1], "sum")
            return shares, float((-loss).exp()), logits_of(model, self.text)

    def check(self, model: SimpleGPT) -> None:
        """Measures the edited model.

        Raises:
            SurgeryError: the target has not become likelier.
        """
        self.after = self._measured(model)
        before, after = self.before[1], self.after[1]
        if not after > ROSE * before:
            raise SurgeryError(
                f"the target's probability went from {before:.3g} to {after:.3g}; it had to rise",
                "an earlier layer: what follows the subject has to look back at it",
            )

    def rows(self) -> list[dict[str, Any]]:
        """Returns the answers to each prompt; the first is the edited one."""
        first = int(self.facts.targets[0][self.facts.targets[0] >= 0][0])
        kinds = ["edited", *["neighbour"] * (len(self.prompts) - 1)]
        found = zip(self.prompts, kinds, self.before[0], self.after[0], strict=True)
        return [
            {
                "prompt": prompt,
                "kind": kind,
                **_answer(self.tokenizer, before, first, "before"),
                **_answer(self.tokenizer, after, first, "after"),
            }
            for prompt, kind, before, after in found
        ]

    def summary(self) -> dict[str, Any]:
        """Returns the target's probability, how many neighbours stay, and the effect on a text."""
        pairs = list(zip(self.before[0], self.after[0], strict=True))[1:]
        same = sum(int(before.argmax() == after.argmax()) for before, after in pairs)
        effect = effect_on_logits(self.before[2], self.after[2], self.text)
        target = {"target before": self.before[1], "target after": self.after[1]}
        return target | {"neighbours": len(pairs), "neighbours unchanged": same} | effect


def _answer(tokenizer: Tokenizer, shares: Tensor, target: int, when: str) -> dict[str, Any]:
    best = int(shares.argmax())
    return {
        f"answer {when}": tokenizer.decode([best]),
        f"its probability {when}": float(shares[best]),
        f"target's first token {when}": float(shares[target]),
    }
