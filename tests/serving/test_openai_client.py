"""OpenAI's own client: whole answers, streams and errors, in a thread and in an event loop."""

import asyncio

import openai
import pytest
from helpers.servers import KEY, served

CHAT = {"model": "one", "messages": [{"role": "user", "content": "hello"}]}
FEW = {"max_completion_tokens": 6, "seed": 3}


@pytest.fixture(scope="module")
def running():
    with served(key=KEY) as found:
        yield found


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.address}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "one", "two"]
    assert client.models.retrieve("two").id == "two"


def test_completions_and_their_stream(client):
    asked = {"model": "two", "prompt": ["The ", "A "], "max_tokens": 7, "seed": 1, "logprobs": 2}
    whole = client.completions.create(**asked)
    texts = {0: "", 1: ""}
    tokens = 0
    for part in client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        for choice in part.choices:
            texts[choice.index] += choice.text
            tokens += len(choice.logprobs.tokens) if choice.logprobs else 0
    assert [choice.text for choice in whole.choices] == [texts[0], texts[1]]
    assert part.usage == whole.usage
    assert whole.usage.completion_tokens == tokens == 14


def test_a_chat_and_its_stream(client):
    whole = client.chat.completions.create(**CHAT, **FEW, logprobs=True, top_logprobs=1)
    parts = list(client.chat.completions.create(**CHAT, **FEW, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert "".join(token.token for token in whole.choices[0].logprobs.content) == text
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_many_at_once_in_an_event_loop(running, client):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{running.address}/v1", api_key=KEY) as many:

            async def streamed(model):
                stream = await many.chat.completions.create(
                    **CHAT | {"model": model}, **FEW, stream=True
                )
                return "".join([p.choices[0].delta.content or "" async for p in stream])

            return await asyncio.gather(*map(streamed, ["tiny", "one", "two"] * 3))

    found = asyncio.run(all_of_them())
    for model, text in zip(["tiny", "one", "two"] * 3, found, strict=True):
        alone = client.chat.completions.create(**CHAT | {"model": model}, **FEW)
        assert alone.choices[0].message.content == text


def test_extras_travel_in_the_body(client):
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.2}
    texts = {
        client.chat.completions.create(**CHAT, **FEW | {"seed": seed}, extra_body=extra)
        .choices[0]
        .message.content
        for seed in (1, 2)
    }
    assert len(texts) == 1  # top_k 1 is greedy


def test_errors_are_of_the_clients_classes(running, client):
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(**CHAT | {"model": "three"})
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**CHAT, temperature=3)
    assert raised.value.param == "temperature"
    stranger = openai.OpenAI(base_url=f"{running.address}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_failing_stream_raises(running, client):
    from dataclasses import replace

    submit = running.server.engine.submit

    def fails(token):
        raise ValueError("poison")

    running.server.engine.submit = lambda request: submit(replace(request, until=fails))
    try:
        with pytest.raises(openai.APIError):
            list(client.chat.completions.create(**CHAT, **FEW, stream=True))
    finally:
        running.server.engine.submit = submit
