"""JSON in and out: bodies within limits, and errors in the form that OpenAI's clients read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from nanogpt_surgery.errors import SurgeryError, printable, quoted
from nanogpt_surgery.serving.request import EngineClosed, QueueFull, TextFailed

LARGEST_BODY = 4 << 20  # bytes
LARGE_BODY = 64 << 10  # bytes: parsed in a thread, so that streams go on
DEEPEST = 32  # objects and lists within each other
MOST_VALUES = 400_000  # commas and brackets of a body
_DISCARDED = 64 << 20  # bytes of a body that is too large, until the connection is closed
_LONGEST_PART = 100  # characters of one folder's or file's name

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_TYPES |= {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """A request that is refused, as the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, printable(message), param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Returns the error as JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """Returns the answer to the request."""
        return JSONResponse(self.body(), self.status, self.headers)


def api_error(error: BaseException) -> ApiError:
    """Returns an error as a client is told it; of one that is a bug nothing but that it is."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        message = f"{error.detail or HTTPStatus(error.status_code).phrase}"
        return ApiError(error.status_code, message, headers=error.headers)
    if isinstance(error, SurgeryError):
        if isinstance(error, QueueFull):
            headers = {"retry-after": str(max(1, math.ceil(error.retry_after)))}
            return ApiError(429, error.what, code="queue_full", headers=headers)
        if isinstance(error, TextFailed):
            return ApiError(500, "the text failed by an error of the server", code="internal_error")
        if isinstance(error, EngineClosed):
            return ApiError(503, error.what, headers={"retry-after": "10"})
        return ApiError(400, str(error))
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")


async def answer_error(_: Request, error: Exception) -> Response:
    """Returns the answer to a request whose handler has raised."""
    return api_error(error).response()


async def read_json(request: Request, most_bytes: int = LARGEST_BODY) -> dict[str, Any]:
    """Returns the JSON object in a request's body.

    Raises:
        ApiError: it is too large, or is no JSON object within the limits, or the client has left.
    """
    size, parts = 0, list[bytes]()
    try:
        async for part in request.stream():
            size += len(part)
            if size <= most_bytes:
                parts.append(part)
            else:  # clients read an answer when they have sent all; what is too large is forgotten
                parts.clear()
            if size > most_bytes + _DISCARDED:
                break
    except ClientDisconnect:
        raise ApiError(499, "the client has left before its body was whole") from None
    if size > most_bytes:
        message = f"the body has {size:,} bytes or more; the limit is {most_bytes:,}"
        raise ApiError(413, message, code="body_too_large")
    data = b"".join(parts)
    return await run_in_threadpool(parse_json, data) if size > LARGE_BODY else parse_json(data)


_TEXTS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


def _n_values(data: bytes) -> int:
    return sum(map(data.count, (b",", b"[", b"{")))


def parse_json(data: bytes) -> dict[str, Any]:
    """Returns the JSON object that bytes hold.

    Raises:
        ApiError: they are no JSON object, or one that is nested too deeply or has too many values.
    """
    if (count := _n_values(data)) > MOST_VALUES:  # those inside of texts are none
        count = _n_values(_TEXTS.sub(b"", data))
    if count > MOST_VALUES:
        raise ApiError(413, f"the body has {count:,} values; the limit is {MOST_VALUES:,}")
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except RecursionError:
        raise ApiError(400, f"the body is nested deeper than {DEEPEST} levels") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}") from None
    if b"\\ud" in data.lower() and not _is_encodable(body):
        raise ApiError(400, "the body has half a surrogate pair, which is no character")
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {quoted(body)}; it must be a JSON object")
    if depth_of(body) > DEEPEST:
        raise ApiError(400, f"the body is nested {depth_of(body)} levels deep; limit {DEEPEST}")
    return body


def _is_encodable(body: Any) -> bool:
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def depth_of(value: Any) -> int:
    """Returns how many objects and lists lie within each other."""
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
    return depth


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def contained(root: Path, name: str) -> Path:
    """Returns the path of a name below a folder, with links followed.

    Names are words of letters, digits, `.`, `-` and `_` with `/` between them; none begins with a
    dot.

    Raises:
        ApiError: the name is not of that form, or leads out of the folder.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not (0 < len(parts) <= 8 and all(map(_is_plain, parts))):
        what = f"{quoted(name)} is not a path below the folder: words of letters, digits, ., - and "
        raise ApiError(400, what + "_ with / between them, none beginning with a dot")
    home, path = root.resolve(), root.joinpath(*parts).resolve()
    if not path.is_relative_to(home) or path == home:
        raise ApiError(400, f"{quoted(name)} leads out of the folder")
    return path


def _is_plain(part: str) -> bool:
    plain = part.replace("-", "").replace("_", "").replace(".", "")
    return 0 < len(part) <= _LONGEST_PART and plain.isascii() and plain.isalnum() and part[0] != "."
