"""Which requests may come in at all: checked before any work, for every route alike.

A page of another origin can make a browser send requests to this machine. It cannot set the Host
header that the browser sends, so on the loopback only the machine's own names are answered (a name
that is rebound to 127.0.0.1 is not), and what says that it comes from elsewhere (Origin,
Sec-Fetch-Site) is refused. Nothing is allowed to other origins (no CORS), and bodies are JSON
alone, which a form cannot send.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanogpt_surgery.errors import SurgeryError, printable
from nanogpt_surgery.serving.http import ApiError

KEY_VARIABLE = "SURGERY_API_KEY"
SHORTEST_KEY = 16  # characters
LARGEST_HEADERS = 32 << 10  # bytes
MOST_HEADERS = 100
LONGEST_PATH = 2_000  # characters, of path and query
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

# Nothing is fetched from elsewhere, nothing is inline, and no other page may frame this one.
ANSWER_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(file: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the key that clients must show: from a file, or else from the environment.

    Raises:
        SurgeryError: the file cannot be read, or the key is too short or has odd characters.
    """
    if file is None:
        key, where = environment.get(KEY_VARIABLE), f"the variable {KEY_VARIABLE}"
    else:
        key, where = _first_line(file), str(file)
    if key is None:
        return None
    if len(key) < SHORTEST_KEY or not re.fullmatch(r"[!-~]+", key):
        raise SurgeryError(
            f"the key in {where} has {len(key)} characters; it must be at least {SHORTEST_KEY} "
            "printable ones of ASCII, without spaces",
            "python3 -c 'import secrets; print(secrets.token_urlsafe(32))' makes one",
        )
    return key


def _first_line(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as lines:
            return lines.read(10_000).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise SurgeryError(f"the key file {file} cannot be read: {reason}") from None


def check_exposure(host: str, key: str | None) -> None:
    """Raises `SurgeryError` if others than this machine would be served without a key."""
    if key is None and not is_loopback(host):
        raise SurgeryError(
            f"{host} can be reached from other machines, and no key is set",
            f"api_key_file=FILE names a file that holds one; or set {KEY_VARIABLE}",
        )


class Guard:
    """An ASGI application around another, which lets through what may come in.

    Args:
        app: the application.
        host: the address that is listened on.
        key: that clients must show; None: none, on the loopback alone.
        is_open: whether a path's answer tells nothing, so that it needs no key.
        log: called with a line about each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        key: str | None,
        is_open: Callable[[str], bool],
        log: Callable[[str], None] | None = None,
    ) -> None:
        check_exposure(host, key)
        self.app, self.key, self.is_open, self.log = app, key, is_open, log
        self.names = _LOOPBACK_NAMES | {host} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        begun, status = time.monotonic(), 0

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in ANSWER_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self.check(scope)
        except ApiError as error:
            await error.response()(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)
        finally:
            if self.log is not None:
                path, took = printable(scope["path"][:200]), time.monotonic() - begun
                line = f"{printable(scope['method'][:20])} {path} {status or 'gone'} {took:.2f} s"
                self.log(line.replace("\n", " "))

    def check(self, scope: Scope) -> None:
        """Raises `ApiError` if a request may not come in."""
        headers, path = Headers(scope=scope), scope["path"]
        sizes = [len(name) + len(value) for name, value in scope["headers"]]
        if len(sizes) > MOST_HEADERS or sum(sizes) > LARGEST_HEADERS:
            raise ApiError(
                431, f"{len(sizes)} headers of {sum(sizes):,} bytes; {LARGEST_HEADERS:,} may be"
            )
        if len(scope.get("raw_path") or path) + len(scope["query_string"]) > LONGEST_PATH:
            raise ApiError(414, f"the path is longer than {LONGEST_PATH:,} characters")
        self._check_host(headers)
        self._check_origin(headers, path)
        if self.key is not None and not self._is_open(scope):
            self._check_key(headers)
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            _check_is_json(headers)

    def _is_open(self, scope: Scope) -> bool:
        return scope["method"] in ("GET", "HEAD") and self.is_open(scope["path"])

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = hosts[0] if len(hosts) == 1 else ""
        if not _HOST.fullmatch(name):
            raise ApiError(400, "the request needs one header Host")
        if self.names is not None and _without_port(name) not in self.names:
            raise ApiError(403, "the name in the header Host is not one of this machine's own")

    def _check_origin(self, headers: Headers, path: str) -> None:
        for origin in headers.getlist("origin"):
            parts = urlsplit(origin)
            own = parts.scheme in ("http", "https") and parts.netloc == headers["host"]
            if not own or origin != f"{parts.scheme}://{parts.netloc}":
                raise ApiError(403, "requests from pages of another origin are not answered")
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and not self.is_open(path):
            raise ApiError(403, "requests from pages of another origin are not answered")

    def _check_key(self, headers: Headers) -> None:
        shown = headers.getlist("authorization")
        scheme, _, given = (shown[0] if len(shown) == 1 else "").partition(" ")
        assert self.key is not None
        right = hmac.compare_digest(given.strip().encode(), self.key.encode())
        if scheme.lower() != "bearer" or not right:
            what = "the key is wrong" if shown else "a key is needed: Authorization: Bearer KEY"
            raise ApiError(
                401, what, code="invalid_api_key", headers={"www-authenticate": "Bearer"}
            )


_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?")


def _without_port(name: str) -> str:
    plain = name.rpartition("]")[0].lstrip("[") if name[0] == "[" else name.partition(":")[0]
    return plain.lower()


def _check_is_json(headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"the body is {kind[:100] or 'of no type'}; it must be application/json"
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "a compressed body is not read")
