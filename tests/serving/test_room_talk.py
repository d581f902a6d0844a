"""`/api/talk`: each side is what it says that it is, and what it would be alone."""

import asyncio
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
from helpers.commands import LETTERS
from helpers.rooms import SMALL, model_with, page_of, posted, streamed
from helpers.servers import held

from nanogpt_surgery import CharacterTokenizer, blend_lora, generate_batch, merge_lora
from nanogpt_surgery.generation.settings import SamplingSettings
from nanogpt_surgery.serving.server import make_app

PROMPT = "the cat"
BLEND = {"one": 0.5, "two": 1.5}
TOKENIZER = CharacterTokenizer(LETTERS)


@pytest.fixture(scope="module")
def page():
    with page_of(model_with("one", "two")) as (client, _):
        yield client


def answers(events):
    """The tokens of each side, and how it ended."""
    sides = {}
    for event in events:
        tokens, ends = sides.setdefault(event["side"], ([], []))
        if "id" in event:
            tokens.append(event)
        if event.get("done"):
            ends.append(event["reason"])
    return [sides[number] for number in sorted(sides)]


def test_two_sides_with_one_seed_are_each_what_they_are_alone(page):
    asked = {"prompt": PROMPT, "seed": 11, "max_new_tokens": 12, "temperature": 0.8, "top_k": 9}
    events = streamed(page, "/api/talk", **asked, sides=[{"adapters": {}}, {"adapters": BLEND}])
    base, blended = model_with(), model_with("one", "two")
    blend_lora(blended, BLEND)
    sampling = SamplingSettings(temperature=0.8, top_k=9)
    for model, (tokens, ends) in zip((base, blended), answers(events), strict=True):
        alone = list(
            generate_batch(model, [TOKENIZER.encode(PROMPT)], 12, sampling, seed=11, likeliest=5)
        )
        assert [token["id"] for token in tokens] == [token.id for token in alone]
        assert ends == ["length"]
        for told, token in zip(tokens, alone, strict=True):
            assert told["probability"] == pytest.approx(math.exp(token.log_probability), abs=1e-4)
            assert [one["id"] for one in told["likeliest"]] == list(token.likeliest)
            assert told["text"] == TOKENIZER.decode([told["id"]])


def test_sides_are_streamed_together_and_say_what_they_are(page):
    sides = [{"adapters": {}}, {"adapters": BLEND}, {"adapters": {"one": 1}}]
    events = streamed(page, "/api/talk", prompt=PROMPT, max_new_tokens=20, sides=sides)
    assert {event["side"] for event in events if event.get("done")} == {0, 1, 2}
    heads = sorted((e for e in events if "hashes" in e), key=lambda head: head["side"])
    assert [head["name"] for head in heads] == ["base", "0.5 · one + 1.5 · two", "one"]
    state = page.get("/api/state").json()
    known = {row["name"]: row["hash"] for row in state["adapters"]}
    base, *adapters = state["model"]["hash"], known["one"], known["two"]
    assert [h["hashes"] for h in heads] == [[base], [base, *adapters], [base, adapters[0]]]
    assert all(events[[e["side"] for e in events].index(i)] == heads[i] for i in range(3))
    assert len({head["seed"] for head in heads}) == 1


def test_no_side_waits_for_another_to_end():
    with page_of(model_with("one", "two")) as (client, server), held(server.engine, 1) as go:
        asked = {"prompt": PROMPT, "max_new_tokens": 9, "sides": [{}, {"adapters": {"two": 1}}]}
        both = threading.Event()
        server.engine.look(lambda _: both.wait(60))
        with client.stream("POST", "/api/talk", json=asked) as answer:
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            both.set()
            first = list(islice((line for line in lines if '"id"' in line), 2))
            assert {json.loads(line)["side"] for line in first} == {0, 1}
            go.set()  # both have a token, and neither can have its second before
            assert len([line for line in lines if '"id"' in line]) == 2 * 8


def test_an_answer_goes_on_from_another_choice(page):
    asked = {"prompt": PROMPT, "temperature": 0, "max_new_tokens": 10}
    side = {"adapters": {"two": 1}}
    [(whole, _)] = answers(streamed(page, "/api/talk", **asked, sides=[side]))
    ids = [token["id"] for token in whole]
    events = streamed(page, "/api/talk", **asked, sides=[side], continue_with=[ids[:4]])
    [(rest, ends)] = answers(events)
    assert [token["id"] for token in rest] == ids[4:]
    assert ends == ["length"]
    other = next(one["id"] for one in whole[4]["likeliest"] if one["id"] != ids[4])
    given = [*ids[:4], other]
    [(rest, _)] = answers(streamed(page, "/api/talk", **asked, sides=[side], continue_with=[given]))
    assert len(rest) == 5
    events = streamed(page, "/api/talk", **asked, sides=[side], continue_with=[ids])
    assert answers(events) == [([], ["length"])]


def test_messages_are_written_by_the_template_and_end_where_it_says(page):
    question = [{"role": "user", "content": "why"}]
    events = streamed(page, "/api/talk", messages=question, max_new_tokens=3, sides=[{}])
    prompt = TOKENIZER.decode(events[0]["prompt_ids"])
    assert "why" in prompt
    assert len(prompt) >= len("why")


def test_an_answer_ends_where_the_context_is_full(page):
    asked = {"prompt": "a" * SMALL.block_size, "sides": [{}], "max_new_tokens": 500}
    [(tokens, ends)] = answers(streamed(page, "/api/talk", **asked))
    assert (len(tokens), ends) == (1, ["length"])
    error = posted(page, "/api/talk", 400, **asked | {"prompt": "a" * (SMALL.block_size + 1)})
    assert error["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"sides": None}, "sides"),
        ({"sides": []}, "sides"),
        ({"sides": [{}] * 5}, "sides"),
        ({"sides": [{"adapters": {"absent": 1}}]}, "sides"),
        ({"sides": [{"adapters": {"<script>": 1}}]}, "sides"),
        ({"sides": [{"adapters": {"one": 1e30}}]}, "sides"),
        ({"sides": [{"adapters": {"one": None}}]}, "sides"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": "x"}, "seed"),
        ({"likeliest": 21}, "likeliest"),
        ({"continue_with": [[1], [2]]}, "continue_with"),
        ({"continue_with": [[-1]]}, "continue_with"),
        ({"continue_with": [[len(LETTERS)]]}, "prompt"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
    ],
)
def test_a_wrong_field_is_named(page, values, param):
    error = posted(page, "/api/talk", 400, **{"prompt": PROMPT, "sides": [{}]} | values)["error"]
    assert error["param"] == param


def test_a_client_that_leaves_frees_its_rows():
    with page_of(model_with("one"), runs_folder=None) as (_, server):
        body = {"prompt": "a", "sides": [{}, {"adapters": {"one": 1}}], "max_new_tokens": 60}
        with held(server.engine, 1):
            asyncio.run(left_after_some_tokens(make_app(server), json.dumps(body).encode()))
        end = time.monotonic() + 60
        while server.engine.figures()["requests_running"] and time.monotonic() < end:
            time.sleep(0.01)
        assert server.engine.figures()["requests_running"] == 0
        figures = server.engine.figures()
        assert sum(n for name, n in figures.items() if "cancelled" in name) == 2


async def left_after_some_tokens(app, body):
    """Asks, reads until tokens come, and leaves."""
    tokens = asyncio.Event()
    sent = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive():
        for message in sent:
            return message
        await tokens.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if b'"id"' in message.get("body", b""):
            tokens.set()
            await asyncio.sleep(0)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/api/talk", "raw_path": b"/api/talk"}
    scope |= {"query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http"}
    scope |= {"server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "root_path": ""}
    await app(scope | {"asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, send)


def test_equal_weights_have_one_hash_however_they_are_written(page):
    sides = [{"adapters": one} for one in ({"one": 1}, {"one": 1.0, "two": 0}, {}, {"two": 0.0})]
    events = streamed(page, "/api/talk", prompt=PROMPT, max_new_tokens=1, sides=sides)
    heads = sorted((e for e in events if "hashes" in e), key=lambda head: head["side"])
    whole, same, base, nothing = (head["hashes"] for head in heads)
    assert whole == same != base == nothing


def test_a_side_that_waits_for_an_operation_has_the_hash_of_after_it():
    go = threading.Event()
    with page_of(model_with("one")) as (client, server), ThreadPoolExecutor(1) as pool:
        before = client.get("/api/state").json()["model"]["hash"]
        done = server.engine.operate(
            lambda model: go.wait(60) and merge_lora(model), server.take_changes
        )
        sides = [{"adapters": {}}]
        talk = pool.submit(streamed, client, "/api/talk", prompt=PROMPT, sides=sides)
        while not server.engine.figures()["requests_waiting"]:
            assert not talk.done()
        go.set()
        done.result(60)
        (head,) = (event for event in talk.result(60) if "hashes" in event)
        after = client.get("/api/state").json()["model"]["hash"]
    assert head["hashes"] == [after] != [before]
