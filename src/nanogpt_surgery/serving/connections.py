"""Connections of clients: how many there may be, and how long one may keep the server waiting.

uvicorn itself waits for ever for a request that does not become whole, and for a client that does
not read its answer; each of them would hold a connection and memory.
"""

from __future__ import annotations

import asyncio
import socket

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.serving.http import ApiError
from nanogpt_surgery.serving.security import check_exposure

MOST_CONNECTIONS = 512
PATIENCE = 60.0  # seconds: for a whole request, and for a client that reads nothing
LARGE_PART = 1 << 20  # bytes of a request for which a client gets that time again
WAITING_CONNECTIONS = 512  # that the system holds until they are accepted


def bind(host: str, port: int, key: str | None = None) -> socket.socket:
    """Returns a socket with an address of this machine, at which it does not listen yet.

    Args:
        host: a name or an address.
        port: 0 takes a free one.
        key: that clients must show.

    Raises:
        SurgeryError: the address cannot be had, or others reach it and there is no key.
    """
    check_exposure(host, key)
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise _not_ours(host, port, error) from None
    return found


def listen(bound: socket.socket) -> None:
    """Lets clients connect.

    Raises:
        SurgeryError: another program listens there since the socket was bound.
    """
    try:
        bound.listen(WAITING_CONNECTIONS)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        bound.close()
        raise _not_ours(host, port, error) from None


def _not_ours(host: str, port: int, error: Exception) -> SurgeryError:
    reason = getattr(error, "strerror", None) or str(error)
    return SurgeryError(
        f"{host}, port {port}, cannot be listened on: {reason}", "choose another port"
    )


class Connection(H11Protocol):
    """A connection that is refused where there are too many, and ended where it stands still."""

    _late: asyncio.TimerHandle | None = None  # when the request must be whole
    _received = 0  # bytes of it since that time was set
    _unread: asyncio.TimerHandle | None = None  # when the client must have read something

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            self.refuse(503, f"there are {MOST_CONNECTIONS} connections, the most that may be")
        else:
            self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends what waits for the client."""
        super().connection_lost(exc)
        for timer in (self._late, self._unread):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Takes a part of a request."""
        was_idle = self.conn.their_state is h11.IDLE
        super().data_received(data)
        self._received += len(data)
        is_next = self.conn.their_state is h11.IDLE and not was_idle
        if is_next or self._received >= LARGE_PART:
            self._stop_waiting()
        self._wait_for_request()

    def _wait_for_request(self) -> None:
        """Sees to it that the request, of which a part is there, is whole in time."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing():
            self._late = self._late or self.loop.call_later(PATIENCE, self._too_late)
        else:
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        self._received = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # nothing was asked
        else:
            self.refuse(408, f"the request was not whole after {PATIENCE:.0f} seconds")

    def pause_writing(self) -> None:
        """Waits for the client to read."""
        super().pause_writing()
        self._wait_for_reading(self.transport.get_write_buffer_size())

    def _wait_for_reading(self, unread: int) -> None:
        """Ends the connection unless the client reads some of what it has not read, in time."""

        def check() -> None:
            left = self.transport.get_write_buffer_size()
            self._wait_for_reading(left) if left < unread else self.transport.abort()

        self._unread = self.loop.call_later(PATIENCE, check)

    def resume_writing(self) -> None:
        """Goes on, since the client reads."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP."""
        self.refuse(400, msg)

    def refuse(self, status: int, message: str) -> None:
        """Ends the connection, with an error in OpenAI's form where no answer has begun."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its handler sends no more
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = ApiError(status, message, headers={"connection": "close"}).response()
            head = h11.Response(
                status_code=status, headers=answer.raw_headers, reason=STATUS_PHRASES[status]
            )
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
