"""Connections that stand still, or are too many, are ended; the others are answered."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import pytest
from helpers.commands import called
from helpers.servers import asked, refused, served, until

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.serving import connections
from nanogpt_surgery.serving.connections import bind, listen

HEAD = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
STANDING_STILL = {
    "half of the headers": HEAD,
    "half of the body": HEAD + b'Content-Length: 50\r\n\r\n{"prompt": ',
    "an unread body": b"POST /nowhere" + HEAD[14:] + b"Content-Length: 50\r\n\r\n{",
}


@pytest.fixture
def running():
    with served() as found:
        yield found


def connected(running):
    return closing(socket.create_connection(("127.0.0.1", running.port), timeout=60))


def answer_on(connection):
    """All that comes until the server ends the connection: status and JSON of each answer."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if body else None


@pytest.mark.parametrize("sent", STANDING_STILL.values(), ids=STANDING_STILL.keys())
def test_threat_11_a_request_that_stands_still_is_ended(running, monkeypatch, sent):
    monkeypatch.setattr(connections, "PATIENCE", 0.3)
    with connected(running) as connection:
        connection.sendall(sent)
        status, body = answer_on(connection)
    assert (status, body["error"]["code"]) == (404 if b"nowhere" in sent else 408, None)
    assert asked(running, "/health")[0] == 200


def test_a_connection_on_which_nothing_is_asked_is_closed_without_a_word(running, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.3)
    with connected(running) as connection:
        assert connection.recv(1 << 16) == b""


def test_a_large_body_gets_its_time_again_with_each_part(running, monkeypatch):
    monkeypatch.setattr(connections, "LARGE_PART", 1000)
    body = json.dumps({"prompt": "a" * 3000}).encode()
    with connected(running) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
        until(lambda: running.server_state.connections)
        (held,) = running.server_state.connections
        times = [held._late]
        for start in range(0, 3000, 1000):
            connection.sendall(body[start : start + 1000])
            until(lambda: held._late is not times[-1])
            times.append(held._late)
        assert all(handle.cancelled() for handle in times[:-1]) and not times[-1].cancelled()
        connection.sendall(body[3000:])
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_client_that_reads_slowly_is_waited_for(running, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.3)
    unread = iter([900, 800, 700, 700])
    ended = threading.Event()
    with connected(running) as connection:
        connection.sendall(HEAD)
        until(lambda: running.server_state.connections)
        (held,) = running.server_state.connections
        transport = SimpleNamespace(
            get_write_buffer_size=lambda: next(unread), abort=ended.set, is_closing=lambda: True
        )
        monkeypatch.setattr(held, "transport", transport)
        held.loop.call_soon_threadsafe(held._wait_for_reading, 1000)
        assert ended.wait(60) and next(unread, None) is None
        monkeypatch.undo()


def test_threat_11_slow_headers_get_no_more_time_by_being_sent(running, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 1.0)
    with connected(running) as connection:
        connection.sendall(HEAD)
        connection.settimeout(0.1)
        for number in range(600):
            try:
                connection.sendall(b"X-%d: a\r\n" % number)
                assert b" 408 " in connection.recv(1 << 16)
                break
            except TimeoutError:
                continue
        assert 1 <= number < 599


def test_threat_11_a_client_that_does_not_read_is_left(running, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.3)
    body = json.dumps({"prompt": "a" * 500_000, "return_token_strs": True}).encode()
    raw = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", running.port))
        connection.sendall(raw)
        seen = running.server_state.connections
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: [None for _ in iter(lambda: len(seen), 0)]).result(60)
        with pytest.raises(ConnectionError):
            while connection.recv(1 << 16):
                pass
            raise ConnectionError  # what had left the server before it ended came whole


def test_threat_11_connections_have_a_limit(running, monkeypatch):
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    with connected(running), connected(running) as second, connected(running):
        with connected(running) as too_many:
            status, body = answer_on(too_many)
        assert (status, "3" in body["error"]["message"]) == (503, True)
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert answer_on(second) == (200, {"status": "ok"})


NO_HTTP = [b"\x16\x03\x01 hello\r\n\r\n", HEAD + b"Content-Length: a\r\n\r\n"]


@pytest.mark.parametrize("sent", NO_HTTP)
def test_what_is_no_http_is_refused_in_the_form_of_all_errors(running, sent):
    with connected(running) as connection:
        connection.sendall(sent)
        status, body = answer_on(connection)
    assert (status, set(body["error"])) == (400, {"message", "type", "param", "code"})
    broken = HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    with connected(running) as connection:
        connection.sendall(broken)
        assert answer_on(connection)[0] == 400
    assert refused(running, 404, "/nowhere")


def test_an_address_is_bound_before_it_is_listened_on():
    with closing(bind("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=60)
        second = bind("127.0.0.1", port)  # as two programs may that open their models
        listen(first)
        with pytest.raises(SurgeryError, match=str(port)):
            listen(second)
        with pytest.raises(SurgeryError, match=str(port)):
            bind("127.0.0.1", port)


def test_what_cannot_be_served_is_refused_before_the_model_is_read():
    with served() as running:
        for more in (["--port", str(running.port)], ["--host", "0.0.0.0"]):
            _, errors = called("serve", "no-such-model", *more, check=1)
            assert more[1] in errors and "no-such-model" not in errors
