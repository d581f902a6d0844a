"""Completions and chats over HTTP: what comes back, what is refused and how."""

import json

import pytest
from helpers.commands import LETTERS
from helpers.models import tiny_model
from helpers.servers import adapted_model, asked, events, held, refused, served
from helpers.tokenizers import byte_level
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery import (
    CharacterTokenizer,
    GPTConfig,
    SamplingSettings,
    SurgeryError,
    generate,
    remove_lora,
    swap_lora,
)
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.serving.fields import CHAT, COMPLETION, UNSUPPORTED, read_fields
from nanogpt_surgery.serving.http import ApiError

LETTER = CharacterTokenizer(LETTERS)
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def running():
    with served() as found:
        yield found


def continued(prompt, count, adapter=None, **options):
    """The text that `generate` continues with, by a model with this adapter, or without any."""
    model = adapted_model("one", "two")
    swap_lora(model, adapter) if adapter else remove_lora(model)
    seed = options.pop("seed", None)
    settings = SamplingSettings(**options)
    return LETTER.decode(
        list(generate(model, LETTER.encode(prompt), count, sampling=settings, seed=seed))
    )


def completed(running, **body):
    status, _, found = asked(running, COMPLETIONS, body)
    assert status == 200, found
    return found


@pytest.mark.parametrize("model", ["tiny", "one", "two"])
def test_a_model_name_chooses_the_adapter(running, model):
    expected = continued("The ", 12, None if model == "tiny" else model, temperature=0)
    found = completed(running, model=model, prompt="The ", max_tokens=12, temperature=0)
    assert found["object"] == "text_completion"
    assert found["model"] == model
    [choice] = found["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected, "length")
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}


def test_seeds_draw_as_generate_does_and_samples_by_the_next_seed(running):
    found = completed(running, prompt="The ", max_tokens=9, seed=7, n=3, top_k=20, top_p=0.9)
    expected = [continued("The ", 9, seed=7 + i, top_k=20, top_p=0.9) for i in range(3)]
    assert [choice["text"] for choice in found["choices"]] == expected
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]


@pytest.mark.parametrize(
    "prompt",
    ["ab", ["ab", "xyz"], LETTER.encode("ab"), [LETTER.encode("ab"), LETTER.encode("xyz")]],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_prompts_come_in_four_forms(running, prompt):
    found = completed(running, prompt=prompt, temperature=0)
    texts = ["ab", "xyz"] if isinstance(prompt[0], list) or prompt == ["ab", "xyz"] else ["ab"]
    expected = [continued(text, 16, temperature=0) for text in texts]
    assert [choice["text"] for choice in found["choices"]] == expected


def test_a_stop_string_ends_a_text_and_is_not_shown(running):
    whole = continued("The ", 20, temperature=0)
    for stop in ([whole[5:7]], whole[5:8], ["~nowhere~", whole[3:5]]):
        texts = [stop] if isinstance(stop, str) else stop
        expected = whole[: min(whole.index(one) for one in texts if one in whole)]
        body = {"prompt": "The ", "max_tokens": 20, "temperature": 0, "stop": stop, "logprobs": 0}
        [choice] = completed(running, **body)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
        assert "".join(choice["logprobs"]["tokens"]) == expected
        status, _, text = asked(running, COMPLETIONS, body | {"stream": True})
        parts = events(text)
        assert status == 200
        assert "".join(part["choices"][0]["text"] for part in parts[:-1]) == expected
        assert [p["choices"][0]["finish_reason"] for p in parts[:-1]][-1] == "stop"


def test_echo_gives_the_log_probabilities_of_the_prompt(running):
    import torch

    model = adapted_model("one", "two")
    remove_lora(model)
    ids = LETTER.encode("hello you")
    [choice] = completed(running, prompt=ids, max_tokens=0, echo=True, logprobs=2)["choices"]
    with torch.no_grad():
        scores = model(torch.tensor([ids]))[0].log_softmax(-1)
    found = choice["logprobs"]
    assert choice["text"] == "hello you"
    assert found["tokens"] == list("hello you")
    assert found["text_offset"] == list(range(9))
    assert found["token_logprobs"][0] is None
    expected = [float(scores[i, ids[i + 1]]) for i in range(8)]
    assert found["token_logprobs"][1:] == pytest.approx(expected, rel=1e-4)
    best = [LETTER.decode([int(row.argmax())]) for row in scores[:-1]]
    assert [max(top, key=top.get) for top in found["top_logprobs"][1:]] == best
    for text, top in zip("ello you", found["top_logprobs"][1:], strict=True):
        assert text in top


def test_best_of_gives_the_likeliest(running):
    body = {"prompt": "The ", "max_tokens": 6, "seed": 1, "logprobs": 0}
    several = completed(running, **body, n=5)["choices"]
    [best] = completed(running, **body, n=1, best_of=5)["choices"]
    means = [sum(choice["logprobs"]["token_logprobs"]) for choice in several]
    assert best["text"] == several[means.index(max(means))]["text"]


def test_biases_and_penalties_reach_the_draw(running):
    never = LETTER.encode(continued("The ", 1, temperature=0))[0]
    body = {"prompt": "The ", "max_tokens": 9, "temperature": 0}
    text = completed(running, **body, logit_bias={str(never): -100})["choices"][0]["text"]
    assert LETTER.decode([never]) not in text
    found = completed(running, **body, repetition_penalty=1.5, presence_penalty=1.0)
    settings = {"temperature": 0, "repetition_penalty": 1.5, "presence_penalty": 1.0}
    assert found["choices"][0]["text"] == continued("The ", 9, **settings)


def test_a_stream_ends_with_usage_where_it_is_asked_for(running):
    body = {"prompt": "The ", "max_tokens": 5, "n": 2, "seed": 3, "stream": True}
    usage = {"stream_options": {"include_usage": True}}
    _, headers, text = asked(running, COMPLETIONS, body | usage)
    assert headers["content-type"].startswith("text/event-stream")
    *parts, last, done = events(text)
    assert done is None
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 10, "total_tokens": 14}
    whole = completed(running, **body | {"stream": False})["choices"]
    for index, choice in enumerate(whole):
        mine = [p["choices"][0] for p in parts if p["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine][-1] == "length"
    assert all(part["usage"] is None for part in parts)


def test_a_chat_is_answered_as_conversation_answers(running):
    from nanogpt_surgery.generation.conversation import Conversation

    model = adapted_model("one", "two")
    swap_lora(model, "two")
    expected = "".join(Conversation(model, LETTER).ask("hello", 9, SamplingSettings(0)))
    body = {"model": "two", "messages": HELLO, "max_completion_tokens": 9, "temperature": 0}
    status, _, found = asked(running, CHATS, body | {"logprobs": True, "top_logprobs": 3})
    assert status == 200, found
    assert found["object"] == "chat.completion"
    [choice] = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
    for token, text in zip(choice["logprobs"]["content"], expected, strict=True):
        assert (token["token"], token["bytes"]) == (text, list(text.encode()))
        assert token["top_logprobs"][0]["logprob"] == token["logprob"]
        assert len(token["top_logprobs"]) == 3


def test_parts_of_text_are_a_text_and_the_developer_speaks_as_the_system(running):
    said = [{"role": "developer", "content": [{"type": "text", "text": "be "}] * 2}, *HELLO]
    same = [{"role": "system", "content": "be be "}, *HELLO]
    bodies = ({"messages": m, "max_tokens": 5, "temperature": 0} for m in (said, same))
    first, second = (asked(running, CHATS, body)[2]["choices"] for body in bodies)
    assert first == second


def test_a_character_in_several_tokens_comes_whole():
    config = GPTConfig.for_family(
        "llama", vocab_size=300, n_embd=24, n_head=6, n_kv_head=2, n_layer=1, block_size=80
    )
    tokenizer = PretrainedTokenizer(byte_level(256 + 3), stop_ids=[0])
    ids = tokenizer.encode("é日😀")
    bias = {str(i): 100 for i in ids}
    body = {"prompt": "a", "max_tokens": 40, "logit_bias": bias, "stream": True, "seed": 5}
    with served(tiny_model(config), tokenizer) as running:
        _, _, text = asked(running, COMPLETIONS, body)
        parts = events(text)[:-1]
        whole = asked(running, COMPLETIONS, body | {"stream": False})[2]["choices"][0]["text"]
        chat = {"messages": HELLO, "max_tokens": 9, "logit_bias": bias, "logprobs": True}
        tokens = asked(running, CHATS, chat)[2]["choices"][0]["logprobs"]["content"]
    assert "".join(part["choices"][0]["text"] for part in parts) == whole
    single = {i: tokenizer.decode([i]) for i in ids}
    assert "\ufffd" in single.values()  # some are half of a character
    assert all(len(token["bytes"]) == 1 for token in tokens if "\ufffd" in token["token"])


def test_tokens_there_and_back(running):
    _, _, found = asked(running, "/tokenize", {"prompt": "hello", "return_token_strs": True})
    assert found["tokens"] == LETTER.encode("hello")
    assert (found["count"], found["max_model_len"]) == (5, 60)
    assert found["token_strs"] == list("hello")
    assert asked(running, "/detokenize", {"tokens": found["tokens"]})[2] == {"prompt": "hello"}
    _, _, talk = asked(running, "/tokenize", {"messages": HELLO})
    assert "hello" in asked(running, "/detokenize", {"tokens": talk["tokens"]})[2]["prompt"]
    assert refused(running, 400, "/detokenize", {"tokens": [len(LETTERS)]})["param"] == "tokens"


def test_metrics_are_of_prometheus(running):
    _, headers, text = asked(running, "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
    assert values["surgery_requests_running"] >= 0
    assert len(values) == len(lines)
    types = dict(line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE"))
    assert types["surgery_requests_total"] == "counter"
    assert types["surgery_first_token_seconds"] == "histogram"
    assert types["surgery_requests_running"] == "gauge"


def test_models_are_listed(running):
    _, _, found = asked(running, "/v1/models")
    assert [(m["id"], m["parent"]) for m in found["data"]] == [
        ("tiny", None),
        ("one", "tiny"),
        ("two", "tiny"),
    ]
    assert asked(running, "/v1/models/two")[2]["id"] == "two"
    assert refused(running, 404, "/v1/models/three")["code"] == "model_not_found"
    error = refused(running, 404, COMPLETIONS, {"model": "three", "prompt": "a"})
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_what_does_not_fit_the_context_is_refused_with_both_numbers(running):
    error = refused(running, 400, COMPLETIONS, {"prompt": "a" * 61})
    assert error["code"] == "context_length_exceeded"
    assert "61" in error["message"]
    error = refused(running, 400, COMPLETIONS, {"prompt": "a" * 31, "max_tokens": 31})
    assert error["code"] == "context_length_exceeded"
    assert asked(running, COMPLETIONS, {"prompt": "a" * 31, "max_tokens": 30})[0] == 200
    assert refused(running, 400, CHATS, {"messages": [{"role": "user", "content": "a" * 60}]})
    asked_for = {"prompt": ["a"] * 40, "n": 2}
    assert "80" in refused(running, 400, COMPLETIONS, asked_for)["message"]


def test_a_full_queue_says_when_to_come_again():
    with served(rows=1, waiting=1) as running:
        with held(running.server.engine):
            body = {"prompt": ["a"] * 9, "max_tokens": 30}
            status, headers, found = asked(running, COMPLETIONS, body)
        assert (status, found["error"]["type"]) == (429, "rate_limit_error")
        assert int(headers["retry-after"]) >= 1
        assert asked(running, COMPLETIONS, {"prompt": "a", "max_tokens": 1})[0] == 200


UNENCODABLE = [("prompt", "é日", COMPLETIONS), ("prompt", "", COMPLETIONS)]


@pytest.mark.parametrize(("field", "value", "path"), UNENCODABLE)
def test_a_text_that_has_no_ids_is_refused_by_name(running, field, value, path):
    assert refused(running, 400, path, {field: value})["param"] == field


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_would_change_the_answer_and_is_not_there_is_refused_by_name(running, field):
    wanted = {"type": "json_object"}
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHATS, {"messages": HELLO})):
        assert refused(running, 400, path, body | {field: wanted})["param"] == field


def test_unknown_fields_and_those_that_change_nothing_are_ignored(running):
    ignored = {"user": "me", "store": True, "tools": [], "response_format": {"type": "text"}}
    body = {"messages": HELLO, "max_tokens": 2, "nonsense": {"a": [1]}} | ignored
    assert asked(running, CHATS, body)[0] == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@pytest.mark.parametrize("fields", [COMPLETION, CHAT], ids=["completion", "chat"])
@pytest.mark.parametrize("name", sorted(COMPLETION.keys() | CHAT.keys()))
@given(value=JSON)
def test_threat_11_a_field_is_of_its_kind_or_refused_by_name(fields, name, value):
    field = fields.get(name)
    if field is None:
        assert name not in read_fields({name: value}, fields)
    elif value is None or field.kind.holds(value):
        found = read_fields({name: value}, fields)[name]
        assert found is (field.default if value is None else value)
    else:
        with pytest.raises(ApiError) as raised:
            read_fields({name: value}, fields)
        assert (raised.value.status, raised.value.param) == (400, name)


EDGES = {  # the last value on each side that is taken, and the first that is not
    "temperature": ([0, 2, 2.0], [-0.001, 2.001, float("inf"), float("nan"), "1", True]),
    "top_p": ([0.001, 1], [0, 1.001, -1]),
    "top_k": ([-1, 0, 1, 2**31], [-2, 2**31 + 1, 1.5]),
    "min_p": ([0, 1], [-0.001, 1.001]),
    "presence_penalty": ([-2, 2], [-2.001, 2.001]),
    "frequency_penalty": ([-2, 2], [-2.001, 2.001]),
    "repetition_penalty": ([0.01, 100], [0, -1, 101]),
    "logit_bias": (
        [{}, {"1": 100}, {"1": -100}],
        [{"a": 1}, {"1": 101}, {"-1": 1}, [1], {"1": "x"}],
    ),
    "n": ([1, 64], [0, 65, 1.0, True]),
    "seed": ([-(2**63), 2**63 - 1], [2**63, -(2**63) - 1, 1.0]),
    "stop": (["a", ["a"] * 4, []], ["", ["a"] * 5, [""], [1], "a" * 1_001]),
    "stream": ([True, False], [1, "true"]),
    "stream_options": ([{}, {"include_usage": True}], [True, {"include_usage": 1}]),
    "model": (["a", "a" * 256], ["", "a" * 257, 1]),
    "prompt": (
        ["", "a", [0], ["a"], [[0], [1]]],
        [[], [-1], [[]], [1, "a"], ["a"] * 65, [True], 3],
    ),
    "max_tokens": ([0, 1 << 20], [-1, (1 << 20) + 1, 1.0]),
    "echo": ([True], [1]),
    "logprobs": ([0, 5], [-1, 6, True]),
    "best_of": ([1, 64], [0, 65]),
}


@pytest.mark.parametrize("name", EDGES)
def test_threat_11_ranges(name):
    taken, not_taken = EDGES[name]
    for value in taken:
        assert read_fields({name: value}, COMPLETION)[name] == value
    for value in not_taken:
        with pytest.raises(ApiError):
            read_fields({name: value}, COMPLETION)
    assert EDGES.keys() == COMPLETION.keys()


MESSAGES = [
    ([], "messages"),
    ([{"role": "robot", "content": "a"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
    (["hello"], "messages[0].role"),
    ([{"role": "tool", "content": "4"}], "messages[0].role"),
]


@pytest.mark.parametrize(("messages", "param"), MESSAGES)
def test_a_message_that_is_none_is_refused_by_its_place(running, messages, param):
    assert refused(running, 400, CHATS, {"messages": messages})["param"] == param


def test_a_failing_stream_sends_an_error(running):
    engine, submit = running.server.engine, running.server.engine.submit
    row_fails = {"prompt": "The ", "max_tokens": 9, "stream": True}
    engine.submit = lambda request: submit(_with_until(request))
    try:
        _, _, text = asked(running, COMPLETIONS, row_fails)
        *_, last = events(text)
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert refused(running, 400, COMPLETIONS, row_fails | {"stream": False})
    finally:
        engine.submit = submit
    assert asked(running, COMPLETIONS, row_fails | {"stream": False})[0] == 200


def _with_until(request):
    from dataclasses import replace

    def fails(token):
        raise SurgeryError("poison")

    return replace(request, until=fails)


def test_health_is_bad_where_nothing_can_be_answered():
    with served() as running:
        assert asked(running, "/health")[0] == 200
        running.server.engine.close(0)
        for path, body in (("/health", None), (COMPLETIONS, {"prompt": "ab"})):
            assert asked(running, path, body)[0] == 503


def test_a_line_of_a_stream_is_one_whatever_stands_in_the_text():
    """Python's splitlines, and clients that use it, end a line at U+2028."""
    letters = LETTERS.replace("~", "\u2028")
    with served(tokenizer=CharacterTokenizer(letters)) as running:
        index = str(CharacterTokenizer(letters).encode("\u2028")[0])
        body = {"prompt": "a", "max_tokens": 3, "logit_bias": {index: 100}, "stream": True}
        _, _, text = asked(running, COMPLETIONS, body)
    lines = [line for line in text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] == "\u2028"
