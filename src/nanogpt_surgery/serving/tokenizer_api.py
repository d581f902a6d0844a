"""`/tokenize`, `/detokenize` and `/tokenizer_info`, with vLLM's fields.

lm-evaluation-harness counts its tokens with them, so that a model needs no tokenizer that
transformers opens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from nanogpt_surgery.data.conversations.chat import chat_ids
from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
from nanogpt_surgery.serving.fields import (
    IDS,
    MESSAGES,
    NAME,
    TEXT,
    Field,
    messages_of,
    read_fields,
    required,
)
from nanogpt_surgery.serving.http import ApiError, read_json
from nanogpt_surgery.serving.tokens import text_of
from nanogpt_surgery.values import SWITCH

if TYPE_CHECKING:
    from nanogpt_surgery.serving.server import Server

TOKENIZE = {
    "model": Field(NAME),
    "prompt": Field(TEXT),
    "messages": Field(MESSAGES),
    "add_special_tokens": Field(SWITCH, True),
    "return_token_strs": Field(SWITCH, False),
}
DETOKENIZE = {"model": Field(NAME), "tokens": Field(IDS)}


def routes(server: Server) -> list[BaseRoute]:
    """Returns the routes."""

    async def tokenize(request: Request) -> Response:
        body = await read_json(request)
        async with server.rendering:
            return JSONResponse(await run_in_threadpool(tokenized, server, body))

    async def detokenize(request: Request) -> Response:
        values = read_fields(await read_json(request), DETOKENIZE)
        server.weights_of(values["model"])
        ids, size = required(values, "tokens"), server.model.config.vocab_size
        if outside := [index for index in ids if index >= size]:
            what = f"tokens has the id {outside[0]}; the vocabulary is 0 to {size - 1}"
            raise ApiError(400, what, param="tokens", code="invalid_value")
        return JSONResponse({"prompt": server.tokenizer.decode(ids)})

    async def info(_: Request) -> Response:
        return JSONResponse(tokenizer_info(server))

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", info),
    ]


def tokenized(server: Server, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ids of a text, or of a conversation up to where the answer begins.

    Raises:
        ApiError: a field is wrong.
    """
    values = read_fields(body, TOKENIZE)
    server.weights_of(values["model"])
    if values["messages"] is not None:
        ids = chat_ids(server.tokenizer, messages_of(values), server.template_of(values["model"]))
    elif values["add_special_tokens"]:
        ids = prompt_ids(server.tokenizer, required(values, "prompt"))
    else:
        ids = server.tokenizer.encode(required(values, "prompt"))
    texts = [text_of(server.tokenizer, i) for i in ids] if values["return_token_strs"] else None
    block = server.model.config.block_size
    return {"tokens": ids, "count": len(ids), "max_model_len": block, "token_strs": texts}


def tokenizer_info(server: Server) -> dict[str, Any]:
    """Returns the tokens that begin and end a text, and the chat template."""
    tokenizer = server.tokenizer
    token_of: Callable[[int | None], str | None] = getattr(tokenizer, "token_of", lambda _: None)
    names = ("bos", "eos", "pad")
    found = {f"{name}_token": token_of(getattr(tokenizer, f"{name}_id", None)) for name in names}
    return {"tokenizer_class": type(tokenizer).__name__, **found} | {
        "chat_template": getattr(tokenizer, "chat_template", None)
    }
