"""An engine gives each request the text that it would have alone."""

import asyncio

import pytest
from helpers.models import CONFIGS, tiny_model

from nanogpt_surgery import SamplingSettings, SurgeryError, generate
from nanogpt_surgery.serving.engine import Engine, Request

LLAMA = CONFIGS["llama"]
SETTINGS = SamplingSettings(0.9, 20, 0.95, repetition_penalty=1.3, frequency_penalty=0.1)
PROMPTS = [(3,), (5, 1, 4, 1, 5, 9, 2), (6, 5, 3, 5)]


@pytest.fixture
def engine():
    engines = []

    def made(model, **options):
        engines.append(Engine(model, **options))
        return engines[-1]

    yield made
    for one in engines:
        one.close(0)


def ids(answer):
    return [token.id for token in answer.result(60)]


def test_texts_are_those_of_generate(engine):
    model = tiny_model(LLAMA)
    serving = engine(model)
    answers = [serving.submit(Request(p, 9, SETTINGS, seed=4)) for p in PROMPTS]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert ids(answer) == list(generate(model, prompt, 9, sampling=SETTINGS, seed=4))
        assert answer.reason == "length"


def test_tokens_reach_an_event_loop(engine):
    model = tiny_model(LLAMA)
    answer = engine(model).submit(Request(PROMPTS[1], 9, SamplingSettings(0)))

    async def taken():
        return [token.id async for token in answer]

    assert asyncio.run(taken()) == list(generate(model, PROMPTS[1], 9, 0))


def test_what_outgrows_the_model_is_refused_with_both_numbers(engine):
    with pytest.raises(SurgeryError, match=r"7 .* 14.* 19"):
        engine(tiny_model(LLAMA)).submit(Request(PROMPTS[1], 14))
