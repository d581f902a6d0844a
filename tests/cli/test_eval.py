"""`surgery eval` on the three kinds of file."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.commands import called, write_adapter, write_model
from helpers.tokenizers import byte_level

from nanogpt_surgery import BPETokenizer, SimpleGPT, open_model, read_conversations, save_model
from nanogpt_surgery.data.conversations.chat import ChatTemplate
from nanogpt_surgery.data.conversations.instructions import encode_conversations
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.token_text import bytes_of_first

TEXT = "The quick brown fox jumps over the lazy dog, and over it again; then it rests.\n" * 6
QUESTIONS = [
    {"prompt": "2 + 2 =", "choices": [" 3", " 4", " many"], "answer": 1},
    {"question": "A cat is", "choices": [" an animal", " a stone"], "answer": " an animal"},
    {"prompt": "Go", "choices": ["!", " away from here"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("eval")
    model = write_model(place / "m", block_size=60)
    write_adapter(model, place / "a", 1)
    (place / "text.txt").write_text(TEXT)
    lines = [json.dumps(question) + "\n" for question in QUESTIONS]
    (place / "questions.jsonl").write_text("".join(lines))
    records = [{"prompt": "ab", "answer": "cd"}, {"instruction": "e", "input": "f", "output": "gh"}]
    (place / "instructions.json").write_text(json.dumps(records))
    return place


def report(folder: Path, *arguments: object) -> dict:
    return json.loads(called("eval", folder / "m", *arguments, "--json")[0])


opened = cache(open_model)


def scores(folder: Path, text: str) -> torch.Tensor:
    """The log-probability of each character of a text but the first, in one plain pass."""
    model, tokenizer = opened(folder / "m")
    ids = torch.tensor(tokenizer.encode(text))
    with torch.no_grad():
        return -F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")


def test_a_text(folder: Path) -> None:
    found = report(folder, folder / "text.txt", "--stride", 1)
    losses = []
    for end in range(1, len(TEXT)):
        losses.append(-float(scores(folder, TEXT[max(0, end - 60) : end + 1])[-1]))
    mean = sum(losses) / len(losses)
    assert found["tokens"] == found["bytes"] == len(TEXT) - 1
    assert found["loss"] == pytest.approx(mean, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(mean / math.log(2), rel=1e-5)
    assert (found["context"], found["stride"]) == (60, 1)


def test_bits_per_byte_count_the_bytes_that_tokens_stand_for(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(TEXT, 280)
    save_model(SimpleGPT(280, 8, 2, 1, 40), tmp_path / "m", tokenizer)
    text = "Theé quick brown fox\n"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    found = report(tmp_path, tmp_path / "t.txt")
    ids = tokenizer.encode(text)
    assert found["tokens"] == len(ids) - 1
    assert found["bytes"] == len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    expected = found["loss"] * found["tokens"] / found["bytes"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(expected)


def test_questions_with_choices(folder: Path) -> None:
    found = report(folder, folder / "questions.jsonl")
    plain, normalised = 0, 0
    for question, right in zip(QUESTIONS, [1, 0, 1], strict=True):
        prompt = question.get("prompt", question.get("question"))
        sums = [
            float(scores(folder, prompt + c)[len(prompt) - 1 :].sum()) for c in question["choices"]
        ]
        each = [total / len(c) for total, c in zip(sums, question["choices"], strict=True)]
        plain += sums.index(max(sums)) == right
        normalised += each.index(max(each)) == right
    assert found["questions"] == 3
    assert found["accuracy"] == pytest.approx(plain / 3)
    assert found["length_normalised_accuracy"] == pytest.approx(normalised / 3)
    assert plain != normalised, "the two would be mistaken for each other"
    assert found["accuracy_by_chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)


def test_instruction_data(folder: Path) -> None:
    found = report(folder, folder / "instructions.json")
    texts = [("User:\nab\n\nAssistant:\n", "cd\n\n"), ("User:\ne\n\nf\n\nAssistant:\n", "gh\n\n")]
    parts = [scores(folder, q + a)[len(q) - 1 :] for q, a in texts]
    assert found["answer_tokens"] == 8
    assert found["loss"] == pytest.approx(-float(torch.cat(parts).mean()), rel=1e-5)
    assert found["template"] == "plain"


def test_an_adapter_takes_part(folder: Path) -> None:
    said, _ = called("eval", folder / "m", folder / "text.txt", "--adapter", folder / "a")
    assert "bits per byte: " in said
    plain = report(folder, folder / "text.txt")["loss"]
    adapted = report(folder, folder / "text.txt", "--adapter", folder / "a")["loss"]
    assert adapted != pytest.approx(plain, rel=1e-3)
    assert f"loss: {adapted:.4g}" in said


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("t.txt", "a", ["1 tokens; perplexity needs at least 2"]),
        (
            "t.jsonl",
            '{"prompt": "a", "choices": ["b"], "answer": 0}',
            ["record 1 has not two choices"],
        ),
        (
            "t.jsonl",
            '{"choices": ["b", "c"], "answer": 0}\n{}',
            ["record 1 has no prompt", "record 2"],
        ),
        (
            "t.jsonl",
            '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
            ["none of its 2 choices"],
        ),
        ("t.jsonl", '{"prompt": "a", "choices": ["b", ""], "answer": 0}', ["or empty"]),
        (
            "t.jsonl",
            '{"prompt": "a", "question": "b", "choices": ["c", "d"], "answer": 0}',
            ["record 1", "prompt", "question"],
        ),
        ("t.jsonl", '{"prompt": "a"}', ["record 1", "prompt", "messages"]),
        ("t.json", "{", ["t.json, line 1, is not JSON"]),
    ],
)
def test_errors_are_sentences(folder: Path, tmp_path: Path, name, text, pieces) -> None:
    (tmp_path / name).write_text(text)
    out, errors = called("eval", folder / "m", tmp_path / name, check=1)
    for piece in pieces:
        assert piece in errors
    assert out == ""


def test_ranges_are_told(folder: Path) -> None:
    wrong = [("context", 61), ("context", 0), ("stride", 0), ("batch-size", 0), ("batch-size", -1)]
    for flag, value in wrong:
        _, errors = called("eval", folder / "m", folder / "text.txt", f"--{flag}", value, check=1)
        assert f"{flag.replace('-', '_')} is {value}" in errors
    for value in (0, -1):
        few = ["--batch-size", value]
        _, errors = called("eval", folder / "m", folder / "instructions.json", *few, check=1)
        assert f"batch_size is {value}; it must be" in errors


@pytest.mark.parametrize("ours", [True, False])
def test_a_first_token_that_is_part_of_a_character_counts_with_its_own_bytes(
    tmp_path: Path, ours: bool
) -> None:
    """The text is one character of three bytes, and a token has one of them."""
    tokenizer = BPETokenizer.train(TEXT, 280) if ours else PretrainedTokenizer(byte_level())
    save_model(SimpleGPT(tokenizer.vocab_size, 8, 2, 1, 40), tmp_path / "m", tokenizer)
    (tmp_path / "t.txt").write_text("鱻", encoding="utf-8")
    found = report(tmp_path, tmp_path / "t.txt")
    assert found["tokens"] == found["bytes"] == 2
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))


@pytest.mark.parametrize(
    ("token", "bytes_"),
    [("<0xE9>", 1), ("é±", 2), ("▁x", 3)],
    ids=["fallback", "alphabet", "other"],
)
def test_a_token_counts_with_the_bytes_that_it_is_written_with(token: str, bytes_: int) -> None:
    class Written:
        def encode(self, text: str) -> list[int]:
            return [7]

        def decode(self, ids: list[int]) -> str:
            return "\ufffd"

        def token_of(self, index: int) -> str:
            return token

    assert bytes_of_first(Written(), "鱻", 7) == bytes_


def test_instruction_data_is_written_as_is_asked(folder: Path) -> None:
    found = report(folder, folder / "instructions.json", "--template", "chatml")
    assert found["template"] == "chatml"
    talks, tokenizer = read_conversations(folder / "instructions.json"), open_model(folder / "m")[1]
    examples = encode_conversations(talks, tokenizer, ChatTemplate("chatml"))
    assert found["answer_tokens"] == sum(sum(example.cut(61).trained) for example in examples)
