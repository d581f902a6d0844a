"""An engine gives each request the text that it would have alone."""

import asyncio

import pytest
import torch
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


@pytest.mark.parametrize("max_new_tokens", [0, 1, 5])
@pytest.mark.parametrize("computed_by", ["auto", "plain"])
def test_log_probabilities_of_a_prompt_are_those_of_a_pass(engine, computed_by, max_new_tokens):
    model = tiny_model(LLAMA)
    asked = Request(
        *(PROMPTS[1], max_new_tokens, SamplingSettings(0)),
        likeliest=2,
        prompt_log_probabilities=True,
    )
    answer = engine(model, engine=computed_by).submit(asked)
    assert len(ids(answer)) == max_new_tokens
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPTS[1]]))[0].log_softmax(-1)
    assert [token.id for token in answer.prompt_tokens] == list(PROMPTS[1][1:])
    for token, row in zip(answer.prompt_tokens, wanted, strict=False):
        assert token.log_probability == pytest.approx(float(row[token.id]), abs=1e-4)
        assert list(token.likeliest) == row.topk(2).indices.tolist()


def test_what_outgrows_the_model_is_refused_with_both_numbers(engine):
    with pytest.raises(SurgeryError, match=r"7 .* 14.* 19"):
        engine(tiny_model(LLAMA)).submit(Request(PROMPTS[1], 14))
