"""The lens, attention and the shares of heads on a text of the page: what the model does inside.

Each measurement runs alone in the engine's thread, between texts, and leaves the model as it was.

Legend: L layers, T tokens, S keys, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from torch import Tensor

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, prompt_ids
from nanogpt_surgery.errors import NotFiniteError
from nanogpt_surgery.interpret import attribution, compare, logit_lens, record
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.several import active_adapters, check_name, has_lora, set_active
from nanogpt_surgery.model.loss import eval_mode
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.serving.fields import IDS, TEXT, Field, read_fields, required
from nanogpt_surgery.serving.http import ApiError, read_json
from nanogpt_surgery.serving.tokens import text_of
from nanogpt_surgery.values import Kind, integer, number

if TYPE_CHECKING:
    from nanogpt_surgery.serving.server import Server

MOST_TOKENS = 256  # of a text that is looked at
LONGEST_TEXT = 64 << 10  # characters that are encoded to see how many tokens they are
MOST_MOVED = 10  # tokens whose probability an adapter changed most
MOST_ADAPTERS, MOST_WEIGHT = 64, 100

_WEIGHT = number("", lambda x: abs(x) <= MOST_WEIGHT)
ADAPTERS = Kind(
    f"an object of at most {MOST_ADAPTERS} numbers from -{MOST_WEIGHT} to {MOST_WEIGHT}, by names "
    "of adapters",
    lambda x: (
        isinstance(x, dict) and len(x) <= MOST_ADAPTERS and all(map(_WEIGHT.holds, x.values()))
    ),
)
LOOK = {"text": Field(TEXT), "ids": Field(IDS), "adapters": Field(ADAPTERS, {})}
ATTENTION = LOOK | {"layer": Field(integer(0, 10_000))}
ATTRIBUTION = LOOK | {
    "position": Field(integer(0, MOST_TOKENS)),
    "token_id": Field(integer(0, 2**31)),
}


@contextmanager
def with_adapters(model: SimpleGPT, weights: Mapping[str, float]) -> Iterator[None]:
    """Within the block, these adapters take part and no others; it is no operation."""
    for name in weights:
        check_name(model, name)
    if not has_lora(model):
        yield
        return
    before = active_adapters(model)
    set_active(model, WeightedAdapters(weights))
    try:
        yield
    finally:
        set_active(model, before)


def ids_of(server: Server, values: Mapping[str, Any]) -> list[int]:
    """Returns the ids of the text that is looked at, or those that were given.

    Raises:
        ApiError: there is neither, they are too many, or one is not in the vocabulary.
        SurgeryError: the vocabulary lacks a character of the text.
    """
    config, ids = server.model.config, values["ids"]
    if ids is None:
        text = required(values, "text")
        if len(text) > LONGEST_TEXT:
            raise ApiError(
                400, f"text has {len(text):,} characters, too many to look at", param="text"
            )
        ids = prompt_ids(server.tokenizer, text)
    if not ids or max(ids) >= config.vocab_size:
        raise ApiError(400, "there are no tokens, or one is not in the vocabulary", param="text")
    most = min(MOST_TOKENS, config.block_size)
    if len(ids) > most:
        what = f"the text has {len(ids):,} tokens; at most {most:,} are looked at"
        raise ApiError(400, what, param="text", code="context_length_exceeded")
    return list(ids)


def lens(
    model: SimpleGPT, tokenizer: Tokenizer, ids: list[int], adapters: Mapping[str, float]
) -> dict[str, Any]:
    """Returns what each layer would answer after each token, and what the adapters moved.

    Raises:
        NotFiniteError: the model computes what is no number.
    """
    row, top = torch.tensor([ids]), min(MOST_MOVED, model.config.vocab_size)
    with with_adapters(model, adapters):
        compared = compare(model, row, top, left_out=False) if adapters else None
        found = compared.lens_with if compared else logit_lens(model, row, 1)
    layers = [
        [
            {"text": text_of(tokenizer, index), "probability": probability, "rank": rank}
            for index, probability, rank in zip(*of_layer, strict=True)
        ]
        for of_layer in zip(
            found.likeliest[:, 0, :, 0].tolist(),  # (L + 1, T)
            _rounded(found.probabilities[:, 0, :, 0], 4),
            found.final_rank[:, 0].tolist(),
            strict=True,
        )
    ]
    moved = [
        {
            "position": one.position,
            "text": text_of(tokenizer, one.id),
            "without": round(one.without, 4),
            "with_it": round(one.with_it, 4),
        }
        for one in (compared.moved if compared else [])
    ]
    return {
        "tokens": [{"id": index, "text": text_of(tokenizer, index)} for index in ids],
        "layers": model.config.n_layer,
        "heads": model.config.n_head,
        "lens": {"layers": layers},
        "moved": moved,
    }


def attention_of(
    model: SimpleGPT, ids: list[int], adapters: Mapping[str, float], layer: int
) -> dict[str, Any]:
    """Returns how much each token looks at those up to it, for each head of a layer.

    Raises:
        ApiError: there is no such layer.
        NotFiniteError: the model computes what is no number.
    """
    if layer >= model.config.n_layer:
        there = f"layers are 0 to {model.config.n_layer - 1}"
        raise ApiError(400, f"there is no layer {layer}; {there}", param="layer")
    point = f"layers.{layer}.attention"
    with with_adapters(model, adapters), eval_mode(model), torch.inference_mode():
        with record(model, point) as found:
            model.hidden(torch.tensor([ids]))
        heads = _rounded(found[point][0], 3)  # (H, T, S)
    # No token looks at those after it: what is known to be 0 is not sent.
    return {"heads": [[row[: t + 1] for t, row in enumerate(head)] for head in heads]}


def shares_of(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    ids: list[int],
    adapters: Mapping[str, float],
    position: int,
    token: int | None = None,
) -> dict[str, Any]:
    """Returns what each head and feed-forward adds to the logit of the token after a position.

    Raises:
        SurgeryError: there is no such position or token.
        NotFiniteError: the model computes what is no number.
    """
    with with_adapters(model, adapters):
        found = attribution(model, torch.tensor([ids]), token, position)
    index = int(found.token)
    return {
        "token": {"id": index, "text": text_of(tokenizer, index)},
        "logit": _rounded(found.logit, 4)[0],
        "embedding": _rounded(found.embedding, 4)[0],
        "heads": _rounded(found.heads[0], 4),  # (L, H)
        "mlp": _rounded(found.feed_forward[0], 4),  # (L)
        "bias": _rounded(found.attention_bias.sum(1) + found.final_bias, 4)[0],
    }


def _rounded(values: Tensor, digits: int) -> list[Any]:
    """Returns numbers as lists, short enough to be sent by the ten thousand."""
    if not bool(values.isfinite().all()):
        raise NotFiniteError("the model computes what is no finite number on this text")
    # In float64, where the shortest text of a rounded number has as many digits.
    rounded: list[Any] = values.double().round(decimals=digits).tolist()
    return rounded


def routes(server: Server) -> list[BaseRoute]:
    """Returns the routes."""

    def reading(
        fields: Mapping[str, Field], measure: Callable[[SimpleGPT, list[int], dict[str, Any]], Any]
    ) -> Callable[[Request], Any]:
        async def read(request: Request) -> Response:
            values = read_fields(await read_json(request), fields)
            server.check_running()
            for name in fields.keys() & {"layer", "position"}:
                required(values, name)
            ids = await run_in_threadpool(ids_of, server, values)
            return JSONResponse(await server.look(lambda model: measure(model, ids, values)))

        return read

    tokenizer = server.tokenizer
    return [
        Route(f"/api/look{path}", reading(fields, measure), methods=["POST"])
        for path, fields, measure in (
            ("", LOOK, lambda m, ids, v: lens(m, tokenizer, ids, v["adapters"])),
            (
                "/attention",
                ATTENTION,
                lambda m, ids, v: attention_of(m, ids, v["adapters"], v["layer"]),
            ),
            (
                "/attribution",
                ATTRIBUTION,
                lambda m, ids, v: shares_of(
                    m, tokenizer, ids, v["adapters"], v["position"], v["token_id"]
                ),
            ),
        )
    ]
