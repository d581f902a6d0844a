"""The threats to a server (SAFETY.md), each by its number."""

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest
from helpers.commands import LETTERS, called, write_model
from helpers.servers import (
    KEY,
    adapted_model,
    adapter_folder,
    asked,
    held,
    listening_server,
    refused,
    served,
    until,
)
from starlette.routing import Mount, Route

from nanogpt_surgery import CharacterTokenizer, SurgeryError, save_adapter
from nanogpt_surgery.serving.http import ApiError, contained
from nanogpt_surgery.serving.security import KEY_VARIABLE, Guard, check_exposure, read_key
from nanogpt_surgery.serving.server import make_app, routes

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
LINE = {"prompt": "The ", "max_tokens": 3}


@pytest.fixture(scope="module")
def running():
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def locked():
    lines: list[str] = []
    with served(key=KEY, log=lines.append) as found:
        found.lines = lines
        yield found


def all_routes(running):
    for route in routes(running.server):
        assert isinstance(route, Route | Mount)
        for method in getattr(route, "methods", None) or ["GET"]:
            path = route.path + ("/page.js" if isinstance(route, Mount) else "")
            yield method, path.replace("{name}", "one").replace("{name:path}", "one")


OUTSIDE = ["../a", "/etc", "a/../../b", "..", ".", "", "a//b", "%2e%2e/a", "a\0b", "a" * 10_000]
OUTSIDE += [
    "~",
    "C:\\a",
    "a\\b",
    ".hidden",
    "a/.git",
    "a b",
    "ａ",
    "a\n",
    "/".join("a" * 9),
    3,
    None,
]


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: repr(name)[:20])
def test_threat_7_a_path_stays_in_its_folder(tmp_path, name):
    with pytest.raises(ApiError) as raised:
        contained(tmp_path, name)
    assert raised.value.status == 400
    assert len(raised.value.message) < 500


def test_threat_7_links_are_followed_before_they_are_judged(tmp_path):
    home = tmp_path / "home"
    (home / "inside").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (home / "out").symlink_to(tmp_path / "outside")
    (home / "in").symlink_to(home / "inside")
    (home / "root").symlink_to(home)
    assert contained(home, "in") == home / "inside"
    for name in ("out", "out/deeper", "root"):
        with pytest.raises(ApiError):
            contained(home, name)


def test_threat_7_adapters_come_from_below_their_folder_alone(tmp_path):
    adapter_folder(tmp_path / "adapters" / "style")
    adapter_folder(tmp_path / "elsewhere")
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "elsewhere")
    load = "/v1/load_lora_adapter"
    with served(adapters_folder=tmp_path / "adapters") as running:
        paths = ["../elsewhere", str(tmp_path / "elsewhere"), "link", "style/../../elsewhere"]
        for path in [*paths, "%2e%2e/elsewhere"]:
            refused(running, 400, load, {"lora_name": "new", "lora_path": path})
        assert refused(running, 404, load, {"lora_name": "new", "lora_path": "nothing"})
        for name in ("a/b", "../a", "a b", "", "x" * 65, "<script>", "keys"):
            refused(running, 400, load, {"lora_name": name, "lora_path": "style"})
        for name in ("tiny", "one"):
            refused(running, 400, load, {"lora_name": name, "lora_path": "style"})
        assert [m["id"] for m in asked(running, "/v1/models")[2]["data"]] == ["tiny", "one", "two"]
    with served() as running:
        refused(running, 403, load, {"lora_name": "new", "lora_path": "style"})


def test_threat_7_an_adapter_of_another_base_is_refused(tmp_path):
    from helpers.models import randomise

    model = adapted_model("one")
    randomise(model, 9)
    save_adapter(model, tmp_path / "other")
    with served(adapters_folder=tmp_path) as running:
        body = {"lora_name": "new", "lora_path": "other"}
        assert "another base" in refused(running, 400, "/v1/load_lora_adapter", body)["message"]
        assert asked(running, COMPLETIONS, LINE | {"model": "one"})[0] == 200


def test_adapters_come_and_go_while_it_runs(tmp_path):
    adapter_folder(tmp_path / "runs" / "style")
    with served(adapted_model(), adapters_folder=tmp_path) as running:
        before = asked(running, COMPLETIONS, LINE | {"temperature": 0})[2]["choices"]
        body = {"lora_name": "new", "lora_path": "runs/style"}
        assert asked(running, "/v1/load_lora_adapter", body)[0] == 200
        with served(adapted_model("new")) as same:
            expected = asked(same, COMPLETIONS, LINE | {"model": "new", "temperature": 0})
        found = asked(running, COMPLETIONS, LINE | {"model": "new", "temperature": 0})
        assert found[2]["choices"] == expected[2]["choices"] != before
        assert asked(running, COMPLETIONS, LINE | {"temperature": 0})[2]["choices"] == before
        assert asked(running, "/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200
        refused(running, 404, COMPLETIONS, LINE | {"model": "new"})
        refused(running, 404, "/v1/unload_lora_adapter", {"lora_name": "new"})


def test_adapters_that_come_and_go_fill_no_memory(tmp_path, monkeypatch):
    from nanogpt_surgery.history.model_history import history_of
    from nanogpt_surgery.serving import adapters_api
    from nanogpt_surgery.serving import server as server_module

    adapter_folder(tmp_path / "style")
    monkeypatch.setattr(server_module, "MOST_OPERATIONS", 5)
    monkeypatch.setattr(adapters_api, "MOST_ADAPTERS", 3)
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    with served(adapted_model(), adapters_folder=tmp_path) as running:
        for _ in range(4):
            asked(running, load, {"lora_name": "a", "lora_path": "style"})
            assert asked(running, unload, {"lora_name": "a"})[0] == 200
        assert len(history_of(running.server.model).operations) <= 5
        names = ["a", "b", "c"]
        for name in names:
            assert asked(running, load, {"lora_name": name, "lora_path": "style"})[0] == 200
        assert (
            "3" in refused(running, 400, load, {"lora_name": "d", "lora_path": "style"})["message"]
        )


BODIES = {
    "too large": (b'{"prompt": "' + b"a" * (5 << 20) + b'"}', 413),
    "too many values": (b'{"prompt": [' + b"1," * 500_000 + b"1]}", 413),
    "nested": (b'{"prompt": ' + b"[" * 40 + b"]" * 40 + b"}", 400),
    "nested beyond the parser": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "no object": (b"[1, 2]", 400),
    "no JSON": (b"{'prompt': 1}", 400),
    "empty": (b"", 400),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', 400),
    "infinite": (b'{"prompt": "a", "temperature": 1e999}', 400),
    "endless integer": (b'{"prompt": "a", "seed": ' + b"1" * 10_000 + b"}", 400),
    "no UTF-8": (b'{"prompt": "\xff"}', 400),
    "half a character": (b'{"prompt": "\\ud800"}', 400),
}


@pytest.mark.parametrize("kind", BODIES)
def test_threat_11_a_body_is_json_within_limits(running, kind):
    body, status = BODIES[kind]
    refused(running, status, COMPLETIONS, body)


def test_threat_11_a_body_without_a_length_is_counted(running):
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=600)
    try:
        parts = (b"a" * (1 << 20) for _ in range(9))
        connection.request("POST", COMPLETIONS, parts, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):  # it stopped listening before all was sent
        assert asked(running, "/health")[0] == 200
    finally:
        connection.close()


def test_threat_11_headers_and_paths_have_limits(running):
    many = {f"X-{i}": "a" for i in range(120)}
    assert asked(running, "/v1/models", headers=many)[0] == 431
    assert asked(running, "/v1/models", headers={"X-Long": "a" * 40_000})[0] == 431
    assert asked(running, "/v1/models?" + "a" * 3_000)[0] == 414


def test_threat_12_a_poisoned_text_ends_alone(running):
    engine, submit = running.server.engine, running.server.engine.submit

    def fails(token):
        raise ValueError("poison")

    def poisoning(request):
        from dataclasses import replace

        is_poison = request.seed == 13
        return submit(replace(request, until=fails) if is_poison else request)

    engine.submit = poisoning
    try:
        bodies = [LINE | {"max_tokens": 30, "seed": seed} for seed in (1, 2, 13, 3)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda body: asked(running, COMPLETIONS, body), bodies))
    finally:
        engine.submit = submit
    assert [status for status, _, _ in found] == [200, 200, 500, 200]
    error = found[2][2]["error"]  # no fault of the request; of a bug nobody is told more
    assert error["type"] == "server_error" and "poison" not in error["message"]
    for body, (_, _, answer) in zip(bodies[:2], found[:2], strict=True):
        assert answer["choices"] == asked(running, COMPLETIONS, body)[2]["choices"]


def test_threat_13_every_route_but_the_shell_needs_the_key(locked):
    shell = {"/", "/health", "/static/page.js"}
    seen = set()
    for method, path in all_routes(locked):
        body = {} if method == "POST" else None
        found = 200 if path in shell and method in ("GET", "HEAD") else 401
        status, headers, text = asked(locked, path, body, method=method)
        assert status == found, path
        if status == 401 and method != "HEAD":
            assert text["error"]["type"] == "authentication_error"
            assert headers["www-authenticate"] == "Bearer"
        seen.add(path)
    assert shell | {COMPLETIONS, CHATS, "/v1/models", "/metrics", "/tokenize"} <= seen
    for path in ("/nowhere", "/api/nowhere", "/docs", "/openapi.json"):
        assert asked(locked, path)[0] == 401
        assert asked(locked, path, headers=AUTHORIZED)[0] == 404
    assert asked(locked, COMPLETIONS, LINE, headers=AUTHORIZED)[0] == 200
    assert asked(locked, "/health", {})[0] == 401  # but read


@pytest.mark.parametrize(
    "shown",
    ["", "Bearer", "Bearer wrong", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"],
)
def test_threat_15_only_the_key_opens(locked, shown):
    assert asked(locked, "/v1/models", headers={"Authorization": shown})[0] == 401


def test_threat_15_the_key_is_compared_in_constant_time_and_appears_nowhere(
    locked, caplog, monkeypatch
):
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    told = len(locked.lines)
    with caplog.at_level(logging.DEBUG):
        wrong = "a-wrong-key-of-some-length"
        answers = [
            asked(locked, "/v1/models", headers={"Authorization": f"Bearer {wrong}"}),
            asked(locked, COMPLETIONS, {"prompt": KEY * 9}, headers=AUTHORIZED),
            asked(locked, f"/v1/models/{KEY}", headers=AUTHORIZED),
        ]
    assert (wrong.encode(), KEY.encode()) in compared
    until(lambda: len(locked.lines) >= told + len(answers))
    assert not [line for line in locked.lines if wrong in line or KEY in line.partition("/v1/m")[0]]
    assert KEY not in caplog.text.replace(f"/v1/models/{KEY}", "")
    assert KEY not in json.dumps(answers[0])
    assert KEY not in repr(locked.server)


HOSTS = {"127.0.0.1": 200, "localhost": 200, "[::1]": 200, "LOCALHOST": 200}
HOSTS |= dict.fromkeys(["evil.example", "127.0.0.1.evil.example", "localhost.", "10.0.0.1"], 403)
HOSTS |= dict.fromkeys(["", "a b", "localhost@evil", "localhost/", "[::1"], 400)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("port", ["", ":8000"])
def test_threat_16_only_this_machines_names_are_answered(running, host, port):
    status = asked(running, "/v1/models", headers={"Host": host + port})[0]
    assert status == HOSTS[host]
    assert asked(running, "/", headers={"Host": host + port})[0] == HOSTS[host]


def test_threat_16_two_hosts_are_none(running):
    raw = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port), 60) as connection:
        connection.sendall(raw.encode())
        assert b" 400 " in connection.recv(100)


ORIGINS = ["http://evil.example", "null", "", "http://localhost:1", "https://127.0.0.1:{port}/a"]
ORIGINS += ["http://127.0.0.1:{port}.evil.example", "file://", "http://127.0.0.1"]


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_threat_17_another_origin_is_refused_before_any_work(running, origin, method):
    origin = origin.format(port=running.port)
    before = running.server.engine.figures()
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    status, found, _ = asked(
        running, COMPLETIONS, LINE if method == "POST" else None, method, headers
    )
    assert status == 403
    assert not [name for name in found if name.startswith("access-control")]
    assert running.server.engine.figures() == before


def test_threat_17_the_page_itself_may_ask_and_nothing_is_allowed_to_others(running):
    own = {"Origin": f"http://127.0.0.1:{running.port}", "Sec-Fetch-Site": "same-origin"}
    status, headers, _ = asked(running, COMPLETIONS, LINE, headers=own)
    assert status == 200
    assert not [name for name in headers if name.startswith("access-control")]
    for site in ("cross-site", "same-site"):
        assert asked(running, "/v1/models", headers={"Sec-Fetch-Site": site})[0] == 403
        assert asked(running, "/", headers={"Sec-Fetch-Site": site})[0] == 200  # a link to it


TYPES = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""]


@pytest.mark.parametrize("kind", TYPES)
def test_threat_17_bodies_are_json_alone(running, kind):
    for path in (COMPLETIONS, CHATS, "/tokenize", "/v1/load_lora_adapter"):
        refused(running, 415, path, LINE, headers={"Content-Type": kind})
    refused(running, 415, COMPLETIONS, LINE, headers={"Content-Encoding": "gzip"})


def test_wrong_methods_and_paths_are_refused_in_the_form_of_errors(running):
    assert asked(running, COMPLETIONS)[0] == 405
    assert refused(running, 405, COMPLETIONS)["type"] == "invalid_request_error"
    assert refused(running, 404, "/v1/nothing")["type"] == "not_found_error"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_threat_18_others_are_not_served_without_a_key(host):
    with pytest.raises(SurgeryError, match=KEY_VARIABLE):
        check_exposure(host, None)
    check_exposure(host, KEY)
    with pytest.raises(SurgeryError):
        Guard(lambda *_: None, host, None, lambda _: True)


def test_threat_18_the_command_refuses_before_it_opens_the_model(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    _, errors = called("serve", "no-such-model", "--host", "0.0.0.0", check=1)
    assert "0.0.0.0" in errors
    assert "--api-key-file" in errors


def test_threat_18_a_key_is_read_from_a_file_or_the_environment(tmp_path):
    assert read_key(None, {}) is None
    assert read_key(None, {KEY_VARIABLE: KEY}) == KEY
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert read_key(file, {KEY_VARIABLE: "another-key-in-the-variable"}) == KEY
    for text in ("short", "", "with spaces in it, which is long", "ä" * 20):
        file.write_text(text)
        with pytest.raises(SurgeryError) as raised:
            read_key(file)
        assert not text or text not in str(raised.value)
    with pytest.raises(SurgeryError, match="nowhere"):
        read_key(tmp_path / "nowhere")


def test_threat_19_every_answer_forbids_what_the_page_does_not_need(running):
    for path in ("/", "/static/page.js", "/v1/models", "/nowhere", "/health"):
        _, headers, _ = asked(running, path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert not {"unsafe-inline", "unsafe-eval", "*", "http:", "https:"} & set(
            policy.replace("'", " ").replace(";", " ").split()
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
    assert asked(running, "/v1/models", headers={"Host": "evil.example"})[1]["x-frame-options"]


def test_threat_19_a_name_is_told_as_json_not_as_a_page(running):
    status, headers, _ = asked(running, COMPLETIONS, {"model": "<script>alert(1)</script>"})
    assert status in (400, 404)
    assert headers["content-type"] == "application/json"


URLS = ["http://169.254.169.254/", "file:///etc/passwd", "data:image/png;base64,AAAA"]


@pytest.mark.parametrize("url", URLS)
def test_threat_20_no_address_is_fetched(running, monkeypatch, url):
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda *_, **__: pytest.fail("an address was fetched")
    )
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": url}},
        {"type": "file", "file": {"file_data": url}},
    ):
        messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
        error = refused(running, 400, CHATS, {"messages": messages})
        assert error["param"] == "messages[0].content[1]"


def test_threat_22_a_text_is_what_it_is_alone(running):
    bodies = [
        LINE | {"model": model, "seed": seed, "max_tokens": 20, "prompt": prompt}
        for seed in (1, 2)
        for model in ("tiny", "one", "two")
        for prompt in ("The ", "Once upon")
    ]
    alone = [asked(running, COMPLETIONS, body)[2]["choices"] for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        mixed = list(pool.map(lambda body: asked(running, COMPLETIONS, body)[2], bodies))
    assert [answer["choices"] for answer in mixed] == alone


def test_threat_23_what_strangers_write_moves_no_terminal(locked):
    asked(locked, "/v1/models/%1b%5b2J%0aGET%20/health%20200", headers=AUTHORIZED)
    until(lambda: [line for line in locked.lines if "[2J" in line])  # told after the answer
    [line] = [line for line in locked.lines if "[2J" in line]
    assert "\x1b" not in line
    assert "\n" not in line
    assert "\\u001b[2J" in line
    body = {"model": "\x1b[2J", "prompt": "a"}
    assert "\x1b" not in refused(locked, 404, COMPLETIONS, body, headers=AUTHORIZED)["message"]


def test_a_client_that_leaves_frees_its_row(running):
    engine, answers = running.server.engine, []

    def kept(submit, request):
        answers.append(submit(request))
        return answers[-1]

    for count, streamed in enumerate((True, False), 1):
        with held(engine) as go:
            engine.submit = partial(kept, engine.submit)
            body = json.dumps(LINE | {"max_tokens": 50, "stream": streamed}).encode()
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            raw = f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body
            with socket.create_connection(("127.0.0.1", running.port), 60) as connection:
                connection.sendall(raw)
                until(partial(_has, answers, count))
            until(lambda: answers[-1].cancelled)
            go.set()
            until(lambda: answers[-1].reason == "cancelled")
            assert len(answers[-1].tokens) < 50


def _has(answers, count):
    return len(answers) == count


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_with_status_0(tmp_path, number):
    write_model(tmp_path / "model")
    command = [sys.executable, "-m", "nanogpt_surgery", "serve", "model", "--port", "0"]
    environment = {k: v for k, v in os.environ.items() if k != KEY_VARIABLE}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        line = process.stdout.readline()
        port = int(line.partition("127.0.0.1:")[2].partition(":")[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=600) as answer:
            assert answer.status == 200
        process.send_signal(number)
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def test_running_answers_end_within_the_grace_and_no_new_ones_begin():
    with served(grace=60) as running, ThreadPoolExecutor(2) as pool:
        engine = running.server.engine
        with held(engine):
            answer = pool.submit(asked, running, COMPLETIONS, LINE)
            until(lambda: engine.figures()["requests_running"] == 1)
            running.stop()
            with suppress(OSError):
                refused(running, 503, COMPLETIONS, LINE)
        status, _, found = answer.result(60)
        assert (status, len(found["choices"][0]["text"])) == (200, 3)


def test_a_server_whose_engine_dies_answers_all_and_ends_with_an_error(monkeypatch):
    from nanogpt_surgery.serving import engine as engine_module

    def fails(_model):
        raise ZeroDivisionError("by a test")

    server = listening_server()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(server.serve_until_stopped)
        assert asked(server, COMPLETIONS, LINE)[0] == 200
        monkeypatch.setattr(engine_module, "WeightHashes", fails)
        with pytest.raises(ZeroDivisionError):
            server.server.engine.operate(lambda _: None).result(60)
        with pytest.raises(SurgeryError, match="ZeroDivisionError: by a test"):
            ended.result(60)


def test_an_adapter_and_the_model_have_two_names():
    from nanogpt_surgery.serving.engine import Engine
    from nanogpt_surgery.serving.server import Server

    model = adapted_model("one")
    engine = Engine(model)
    try:
        with pytest.raises(SurgeryError, match="one"):
            Server(engine, model, CharacterTokenizer(LETTERS), "one")
        assert make_app(Server(engine, model, CharacterTokenizer(LETTERS), "tiny")).names
    finally:
        engine.close(0)


def test_a_client_that_leaves_within_its_body_is_no_error_of_the_server(caplog):
    lines = []
    with served(log=lines.append) as running:
        head = "POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", running.port), timeout=600) as connection:
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        until(lambda: [line for line in lines if "/tokenize" in line])
        assert asked(running, "/v1/models")[0] == 200
    assert not [line for line in lines if " 500 " in line]
    assert not [record for record in caplog.records if record.exc_info]
