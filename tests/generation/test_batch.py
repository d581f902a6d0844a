"""A row in a batch is continued as it is alone."""

import pytest
import torch
from helpers.models import CONFIGS, FAMILY_CONFIGS, tiny_model

from nanogpt_surgery import SurgeryError, SurgeryWarning, generate
from nanogpt_surgery.generation.batch import _Padded, generate_batch
from nanogpt_surgery.generation.generate import last_logits
from nanogpt_surgery.generation.settings import SamplingSettings
from nanogpt_surgery.model.layout import Layout

PROMPTS = [[3], [5, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5]]
SETTINGS = SamplingSettings(0.9, 20, 0.95, repetition_penalty=1.3, frequency_penalty=0.1)


def rows_of(tokens, count):
    rows = [[] for _ in range(count)]
    for token in tokens:
        rows[token.row].append(token.id)
    return rows


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_of_different_lengths_are_as_alone(kind):
    model = tiny_model(CONFIGS[kind])
    together = rows_of(generate_batch(model, PROMPTS, 9, SETTINGS, seed=11), 3)
    alone = [
        list(generate(model, prompt, 9, sampling=SETTINGS, seed=11 + i))
        for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone


@pytest.mark.parametrize("kind", ["gpt2", "llama-scaled-tied", "qwen3"])
def test_log_probabilities_are_those_of_a_plain_pass(kind):
    model = tiny_model(CONFIGS[kind])
    texts = [list(prompt) for prompt in PROMPTS]
    for token in generate_batch(model, PROMPTS, 6, SETTINGS, seed=2, likeliest=3):
        with torch.no_grad():
            plain = model(torch.tensor([texts[token.row]]))[0, -1].log_softmax(-1)
        assert token.log_probability == pytest.approx(float(plain[token.id]), abs=1e-4)
        assert list(token.likeliest) == plain.topk(3).indices.tolist()
        assert list(token.likeliest.values()) == pytest.approx(
            plain.topk(3).values.tolist(), abs=1e-4
        )
        texts[token.row].append(token.id)


@pytest.mark.parametrize("kind", ["gpt2", "llama-scaled-tied"])
def test_without_the_decoder_a_row_is_to_the_bit_what_it_is_alone(kind):
    """PyTorch's products would round otherwise in a batch."""
    model = tiny_model(CONFIGS[kind])
    model.layers[0].register_forward_hook(lambda *_: None)  # which the decoder does not compute

    def told(prompts, seed):
        tokens = generate_batch(model, prompts, 9, SETTINGS, seed=seed)
        return [(t.row, t.id, t.log_probability) for t in tokens]

    together = told(PROMPTS, 5)
    for row, prompt in enumerate(PROMPTS):
        alone = [(row, *token[1:]) for token in told([prompt], 5 + row)]
        assert [token for token in together if token[0] == row] == alone


@pytest.mark.parametrize("kind", CONFIGS)
def test_padded_rows_are_as_alone_up_to_rounding(kind):
    """As on other devices than the CPU."""
    model = tiny_model(CONFIGS[kind])
    texts = {row: list(prompt) for row, prompt in enumerate(PROMPTS)}
    rows = _Padded(model, PROMPTS, 9)
    for new in (7, 1, 2):
        for text, logits in zip(texts.values(), rows.logits(texts), strict=True):
            with torch.inference_mode():
                wanted = last_logits(model, torch.tensor(text))
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=3e-5)
            text.append(new)


def test_a_row_that_ends_does_not_change_the_others():
    model = tiny_model(FAMILY_CONFIGS["llama"])
    free = rows_of(generate_batch(model, PROMPTS, 9, SamplingSettings(0)), 3)
    stop = free[1][2]
    ended = rows_of(generate_batch(model, PROMPTS, 9, SamplingSettings(0), stop_ids=[stop]), 3)
    assert ended == [row[: row.index(stop)] if stop in row else row for row in free]


def test_a_row_that_outgrows_the_context_slides_by_itself():
    model = tiny_model(FAMILY_CONFIGS["gpt2"])
    long = list(range(15))
    with pytest.warns(SurgeryWarning, match="outgrown"):
        together = rows_of(generate_batch(model, [[3, 4], long], 9, SamplingSettings(0)), 2)
    with pytest.warns(SurgeryWarning, match="outgrown"):
        alone = [list(generate(model, prompt, 9, 0)) for prompt in ([3, 4], long)]
    assert together == alone


def test_several_samples_differ_and_come_again():
    model = tiny_model(FAMILY_CONFIGS["llama"])
    first, second = (rows_of(generate_batch(model, [[3]] * 4, 8, seed=5), 4) for _ in range(2))
    assert first == second
    assert len({tuple(row) for row in first}) > 1


def test_prompts_that_cannot_be_are_refused():
    model = tiny_model(FAMILY_CONFIGS["llama"])
    for prompts, message in (([], "no prompts"), ([[1], []], "empty"), ([[99]], "vocabulary")):
        with pytest.raises(SurgeryError, match=message):
            generate_batch(model, prompts, 3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_documents_in_a_row_do_not_see_each_other(kind):
    model = tiny_model(CONFIGS[kind])
    texts = [torch.tensor([text]) for text in ([7, 8, 9], [1, 2], [5, 5, 6, 1])]
    documents = torch.tensor([[0] * 3 + [4] * 2 + [1] * 4])
    with torch.no_grad():
        packed = model(torch.cat(texts, 1), layout=Layout.of_documents(documents))
        alone = torch.cat([model(text) for text in texts], 1)
    assert torch.allclose(packed, alone, atol=1e-5)
