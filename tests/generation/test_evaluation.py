import math

import pytest
import torch
import torch.nn.functional as F
from helpers.models import FAMILY_CONFIGS, tiny_model
from transformers import AutoModelForCausalLM

from nanogpt_surgery import CharacterTokenizer, SurgeryError, save_model
from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset
from nanogpt_surgery.data.conversations.instructions import Example
from nanogpt_surgery.generation import evaluation
from nanogpt_surgery.generation.evaluation import (
    answer_loss,
    multiple_choice,
    perplexity,
    scored,
)

MODEL = tiny_model(FAMILY_CONFIGS["llama-scaled-tied"])
BLOCK = MODEL.config.block_size
LETTERS = CharacterTokenizer("".join(map(chr, range(40, 93))))


def text(length, seed=0):
    return torch.randint(53, (length,), generator=torch.Generator().manual_seed(seed))


def plain_loss(ids, stride):
    """Token by token: each from the window that predicts it first."""
    losses = []
    for target in range(1, len(ids)):
        window = max(0, math.ceil((target - BLOCK) / stride)) * stride
        with torch.no_grad():
            logits = MODEL(ids[None, window:target])[0, -1]
        losses.append(-float(logits.log_softmax(-1)[ids[target]]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("stride", [1, 4, 7, BLOCK])
@pytest.mark.parametrize("length", [2, 3, BLOCK, BLOCK + 1, BLOCK + 2, 60])
def test_every_token_is_predicted_once_from_the_first_window_that_can(stride, length):
    ids = text(length)
    found = perplexity(MODEL, ids, stride, batch_size=3)
    assert found.tokens == length - 1
    assert found.loss == pytest.approx(plain_loss(ids, stride), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_rows_of_different_lengths_are_scored_as_alone():
    texts = [text(5, 1), text(12, 2), text(2, 3)]
    for (row, _), ids in zip(scored(MODEL, texts), texts, strict=True):
        assert torch.allclose(row, scored(MODEL, [ids])[0][0], atol=1e-5)


def test_the_likelihood_of_an_answer_is_that_of_its_tokens_after_the_question():
    choices = multiple_choice(MODEL, LETTERS, "ABC", ["D", "EFG"])
    for choice in choices:
        ids = torch.tensor(LETTERS.encode("ABC" + choice.text))
        with torch.no_grad():
            scores = MODEL(ids[None])[0].log_softmax(-1)
        expected = sum(float(scores[i - 1, ids[i]]) for i in range(3, len(ids)))
        assert choice.log_likelihood == pytest.approx(expected, rel=1e-5)
        assert choice.tokens == len(choice.text)
        assert choice.per_character == pytest.approx(expected / len(choice.text), rel=1e-5)


def test_all_answers_of_one_token_share_the_probability_among_them():
    letters = list(LETTERS.character_to_id)
    choices = multiple_choice(MODEL, LETTERS, "AB", letters)
    assert sum(math.exp(choice.log_likelihood) for choice in choices) == pytest.approx(1, rel=1e-5)


def test_the_loss_of_answers_is_that_of_their_targets_alone():
    examples = [
        Example(tuple(text(n, n).tolist()), tuple(i >= n // 2 for i in range(n))) for n in (5, 9, 6)
    ]
    data = InstructionDataset(examples, BLOCK)
    with torch.no_grad():
        logits = MODEL(data.inputs.long())
    expected = F.cross_entropy(logits.flatten(0, 1), data.targets.long().flatten())
    found = answer_loss(MODEL, examples, batch_size=2)
    assert found.loss == pytest.approx(float(expected), rel=1e-5)
    assert found.tokens == data.counts.trained
    with pytest.raises(SurgeryError, match="no answer lies within"):
        answer_loss(MODEL, [Example((1, 2, 3), (False,) * 3)])


def test_what_cannot_be_is_refused():
    with pytest.raises(SurgeryError, match="1 tokens; perplexity needs"):
        perplexity(MODEL, [3])
    with pytest.raises(SurgeryError, match=f"stride is {BLOCK + 1}"):
        perplexity(MODEL, text(9), BLOCK + 1)
    with pytest.raises(SurgeryError, match=f"context is {BLOCK + 1}"):
        perplexity(MODEL, text(9), context=BLOCK + 1)
    with pytest.raises(SurgeryError, match="needs answers"):
        multiple_choice(MODEL, LETTERS, "A", ["B", ""])
    with pytest.raises(SurgeryError, match="23 tokens, the block_size is 19"):
        multiple_choice(MODEL, LETTERS, "A" * 20, ["BCD"])


@pytest.mark.parametrize(("stride", "context"), [(5, BLOCK), (BLOCK, BLOCK), (3, 8), (1, 2)])
def test_a_strided_window_gives_what_transformers_loss_gives(stride, context, tmp_path):
    """The windows of transformers' guide to perplexity, its model and its loss."""
    save_model(MODEL, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids, total, before = text(61, 5), 0.0, 1
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + context + 1]
        new = begin + len(window) - before  # labels that no window before has had
        labels = torch.cat((torch.full((len(window) - new,), -100), window[len(window) - new :]))
        with torch.no_grad():
            total += float(theirs(window[None], labels=labels[None]).loss) * new
        before += new
        if before == len(ids):
            break
    found = perplexity(MODEL, ids, stride, batch_size=3, context=context)
    assert found.tokens == before - 1 == 60
    assert found.loss == pytest.approx(total / 60, rel=1e-5)


def test_a_stride_of_one_gives_each_token_the_longest_context():
    losses = []
    ids = text(50, 8)
    for target in range(1, 50):
        with torch.no_grad():
            logits = MODEL(ids[None, max(0, target - BLOCK) : target])[0, -1]
        losses.append(F.cross_entropy(logits[None], ids[None, target]))
    found = perplexity(MODEL, ids, stride=1)
    assert found.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert found.loss != pytest.approx(perplexity(MODEL, ids, BLOCK).loss, rel=1e-3)


def test_logits_in_parts_are_those_of_a_whole_pass(monkeypatch):
    texts = [text(9, 1), text(4, 2)]
    monkeypatch.setattr(evaluation, "POSITIONS", 3)
    for ids, (found, likeliest) in zip(texts, scored(MODEL, texts), strict=True):
        with torch.no_grad():
            whole = MODEL(ids[None, :-1])[0].log_softmax(-1)
        assert torch.allclose(found, whole.gather(-1, ids[1:, None])[:, 0], atol=1e-5)
        assert likeliest.tolist() == (whole.argmax(-1) == ids[1:]).tolist()
