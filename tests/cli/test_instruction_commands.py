"""Instruction data on the command line: told from text, counted, shown, and trained on."""

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.commands import until_closed
from helpers.models import FAMILY_CONFIGS, tiny_model
from helpers.tokenizers import byte_level

from nanogpt_surgery import (
    InstructionDataset,
    encode_conversations,
    evaluate,
    load_adapter,
    open_model,
    read_conversations,
    save_model,
)
from nanogpt_surgery.cli.framework.app import run
from nanogpt_surgery.data.text import corpus
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer

SIZE = 96
STEPS = ["--max-steps", "2", "--evaluate-every", "1", "--batch-size", "3", "--rank", "2"]
STEPS += ["--precision", "float32", "--compile", "off", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model that knows ChatML, instruction data and a text."""
    folder = tmp_path_factory.mktemp("instructions")
    tokenizer = PretrainedTokenizer(byte_level(), stop_ids=[2])
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": SIZE}
    save_model(tiny_model(replace(FAMILY_CONFIGS["llama"], **sizes)), folder / "m", tokenizer)
    records = [{"instruction": f"Add {i}", "input": "to 1", "output": str(i + 1)} for i in range(9)]
    records += [{"messages": [{"role": "user", "content": "?"}, assistant(i)]} for i in range(11)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "text.jsonl").write_text('{"text": "to be, or not to be"}\n' * 60)
    (folder / "a.txt").write_text("to be, or not to be\n" * 60)
    return folder


def assistant(number: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"No, {number}. [sic]"}


def surgery(*words: object) -> None:
    run([str(word) for word in words])


def test_finetune_trains_on_answers_and_measures_on_those_held_out(place, tmp_path, capsys):
    arguments = [place / "m", place / "a.jsonl", "--out", tmp_path / "o", *STEPS]
    surgery("finetune", *arguments, "--json")
    out, err = capsys.readouterr()
    assert counts(err)["trained on"]["examples"] == "18"
    assert "note:" not in err
    model, tokenizer = open_model(place / "m")
    load_adapter(model, tmp_path / "o")
    examples = encode_conversations(read_conversations(place / "a.jsonl"), tokenizer)[18:]
    held_out = InstructionDataset.for_tokenizer(examples, tokenizer, SIZE)
    assert held_out.counts.trained < 0.5 * held_out.counts.tokens
    found = json.loads(out)["best_validation_loss"]
    assert found == pytest.approx(evaluate(model, held_out), rel=1e-5)
    surgery("finetune", *arguments, "--resume")
    assert "going on from step 2 of 2" in capsys.readouterr().err


def counts(err: str) -> dict[str, dict[str, str]]:
    """The table of counts on stderr, by its first column."""
    lines = err[err.index("instruction data\n") :].splitlines()[1:4]
    header, *rows = (re.split(r"\s{2,}", line.strip()) for line in lines)
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


@pytest.mark.parametrize(
    ("flags", "share", "rows"),
    [([], (0.1, 0.5), 18), (["--pack"], (0.1, 0.5), 12), (["--no-answers-only"], (0.9, 1), 18)],
)
def test_flags_say_what_is_trained_on(flags, share, rows, place, tmp_path, capsys):
    surgery("finetune", place / "m", place / "a.jsonl", "--out", tmp_path / "o", *STEPS, *flags)
    found = counts(capsys.readouterr().err)
    trained = found["trained on"]
    assert share[0] < float(trained["trained share"].removesuffix(" %")) / 100 < share[1]
    assert ("--pack" in flags) == (trained.get("rows", "-") != "-")
    assert "--pack" not in flags or int(trained["rows"]) <= rows
    assert int(trained["answers that end"]) == (36 if share[1] == 1 else 18)
    assert (trained["examples"], found["held out"]["examples"]) == ("18", "2")


def test_data_of_which_it_is_not_clear_what_it_is_is_refused(place, tmp_path, capsys):
    out = ["--out", tmp_path / "o", *STEPS, "--block-size", 16]
    for data in (["a.jsonl", "a.txt"], ["text.jsonl"]):
        with pytest.raises(SystemExit):
            surgery("finetune", place / "m", *(place / name for name in data), *out)
        assert data[-1] in (err := capsys.readouterr().err)
        assert "--data text" not in err
        assert not (tmp_path / "o").exists()
    with pytest.raises(SystemExit):
        surgery("finetune", place / "m", place / "text.jsonl", *out, "--data", "instructions")
    assert "record 1, has the fields text" in capsys.readouterr().err
    surgery("finetune", place / "m", place / "text.jsonl", *out, "--data", "text")
    err = capsys.readouterr().err
    assert "instruction data" not in err
    assert "looks like JSON" in err


def test_answers_that_never_end_are_said(place, tmp_path, capsys):
    record = {"prompt": "?", "completion": "and so on " * 40}
    (tmp_path / "long.jsonl").write_text(json.dumps(record))
    surgery("data", "preview", place / "m", tmp_path / "long.jsonl")
    out, err = capsys.readouterr()
    assert "note: no target ends a turn" in err
    assert "tokens, cut off after 97\n" in out
    assert "\ntruncated: 1\n" in out


def test_preview_shows_what_is_trained_on_in_brackets_and_counts(place, capsys):
    surgery("data", "preview", place / "m", place / "a.jsonl", "--examples", 2)
    out = capsys.readouterr().out
    assert "user\nAdd 0\n\nto 1<|im_end|>\n<|im_start|>assistant\n⟦1<|im_end|>\n⟧\nexample 2" in out
    for line in ("examples: 20", "answers that end: 20", "truncated: 0", "dropped: 0"):
        assert f"\n{line}\n" in out
    alone = [place / "m" / "tokenizer.json", place / "a.jsonl", "--json", "--examples", 1]
    surgery("data", "preview", *alone, "--block-size", 45, "--template", "plain")
    report = json.loads(capsys.readouterr().out)
    assert report["preview"][0] == [
        {"text": "User:\nAdd 0\n\nto 1\n\nAssistant:\n", "trained": False},
        {"text": "1<|im_end|>\n\n", "trained": True},
    ]
    assert report["trained_tokens"] < report["tokens"]


def test_preview_colours_what_is_trained_on_on_a_terminal(place):
    ours, theirs = pty.openpty()
    words = ["data", "preview", place / "m", place / "a.jsonl", "--examples", "1"]
    command = [sys.executable, "-m", "nanogpt_surgery", *map(str, words)]
    with subprocess.Popen(command, stdout=theirs, env=os.environ | {"TERM": "xterm"}) as process:
        os.close(theirs)
        shown = until_closed(ours).decode()
    assert process.returncode == 0
    assert "assistant\r\n\x1b[1;32m1<|im_end|>" in shown
    assert "⟦" not in shown


def test_a_tokenizer_that_is_not_there_is_said(place, tmp_path, capsys):
    with pytest.raises(SystemExit):
        surgery("data", "preview", tmp_path / "none", place / "a.jsonl")
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        surgery("data", "preview", place / "m")
    assert "no file of instruction data is named" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        surgery("data", "preview", place / "m", place / "a.jsonl", "--block-size", 0)
    assert "block_size is 0; it must be at least 1" in capsys.readouterr().err


def test_help_answers_without_torch():
    program = (
        "import sys\nfrom nanogpt_surgery.cli.framework.app import run\n"
        "run(['data', 'preview', '--help'])\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "surgery data preview" in done.stdout


def test_preview_shows_each_token_by_itself(place, tmp_path, capsys):
    record = {"prompt": "a 鱻", "completion": "b"}
    (tmp_path / "t.jsonl").write_text(json.dumps(record))
    few = [place / "m", tmp_path / "t.jsonl", "--tokens"]
    surgery("data", "preview", *few, "--json")
    _, tokenizer = open_model(place / "m")
    [example] = encode_conversations(read_conversations(tmp_path / "t.jsonl"), tokenizer)
    found = json.loads(capsys.readouterr().out)["preview"][0]
    assert len(found) == len(example.ids)
    assert [token["trained"] for token in found] == list(example.trained)
    assert "".join(token["text"] for token in found) == tokenizer.decode(example.ids)
    texts = [token["text"] for token in found]
    place_of = texts.index("鱻")
    assert texts[place_of - 3 : place_of] == [" ", "", ""]
    surgery("data", "preview", *few)
    assert "⟦b⟧│⟦<|im_end|>⟧│⟦\n⟧│" in capsys.readouterr().out


def test_a_text_behind_the_targets_is_told_from_one(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    (place / "lm_head").mkdir(exist_ok=True)  # a folder of a layer's name is that layer
    for path, kind in (("a.txt", "file"), (".", "folder")):
        with pytest.raises(SystemExit):
            surgery("finetune", "m", "--out", tmp_path / "o", "--targets", "lm_head", path)
        err = capsys.readouterr().err
        assert f"{path} is a {kind}" in err
        assert f"surgery finetune MODEL {path} … --targets" in err
        assert "no text was named" not in err


def test_a_fine_tuning_says_what_it_trains_on_and_how_fast(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "python_source", lambda: "to be, or not to be\n" * 60)
    few = ["--out", tmp_path / "o", *STEPS, "--block-size", 16, "--plan", "--learning-rate", 0.25]
    surgery("finetune", place / "m", *few)
    err = capsys.readouterr().err
    assert "no text was named" in err and "standard library" in err
    surgery("finetune", place / "m", place / "a.txt", *few)
    err = capsys.readouterr().err
    assert "no text was named" not in err
    assert "windows to train on" in err
    assert "AdamW, at a learning rate of 0.25" in err


TABLE = "Question,Answer,Topic\n" + "".join(f'"{i}, and 1?",{i + 1},sums\n' for i in range(20))
PRICES = "item,price,count\n" + "tea,3,4\n" * 90
SMALL = "--n-embd 16 --n-head 2 --n-layer 1 --block-size 16 --max-steps 1 --plan".split()


@pytest.mark.parametrize("command", ["train", "data prepare"])
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", json.dumps({"prompt": "a", "completion": "b"}), "surgery finetune MODEL"),
        ("q.csv", TABLE, "surgery finetune MODEL"),
        ("x.json", '{"name": "x", "size": 3}', "name, size"),
        ("prices.csv", PRICES, "item, price, count"),
        ("prose.jsonl", json.dumps({"text": "to be"}), ".txt"),
    ],
)
def test_records_are_not_learned_as_text(command, name, text, said, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit):
        surgery(*command.split(), tmp_path / name, "--out", tmp_path / "o")
    err = capsys.readouterr().err
    assert name in err
    assert said in err
    assert not (tmp_path / "o").exists()


def test_what_looks_like_data_is_learned_as_text_with_a_word(place, tmp_path, capsys):
    (tmp_path / "prices.txt").write_text(PRICES)
    surgery("train", tmp_path / "prices.txt", "--out", tmp_path / "o", *SMALL)
    assert "prices.txt looks like a table of 3 columns" in capsys.readouterr().err
    surgery("train", place / "a.txt", "--out", tmp_path / "o", *SMALL)
    assert "looks like" not in capsys.readouterr().err
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "prices.csv").write_text(PRICES)
    surgery("train", tmp_path / "corpus", "--out", tmp_path / "o", *SMALL)
    assert "1 files of data (prices.csv)" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_a_table_of_questions_and_answers_is_instruction_data(place, tmp_path, capsys):
    """And is the same as the records in JSON, ShareGPT's form included, for every command."""
    pairs = [(f"{i}, and 1?", str(i + 1)) for i in range(20)]
    (tmp_path / "a.csv").write_text(TABLE)
    lines = [f"{q}\t{a}\n" for q, a in pairs]
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\n" + "".join(lines))
    talks = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for q, a in pairs
    ]
    (tmp_path / "a.json").write_text(json.dumps(talks))
    shown, losses = [], []
    for name in ("a.csv", "a.tsv", "a.json"):
        surgery("data", "preview", place / "m", tmp_path / name, "--json", "--examples", 20)
        shown.append(json.loads(capsys.readouterr().out))
        surgery("eval", place / "m", tmp_path / name, "--json")
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert shown[0]["examples"] == 20
    assert shown[0] == shown[1] == shown[2]
    assert losses[0] == losses[1] == losses[2]
    surgery("finetune", place / "m", tmp_path / "a.csv", "--out", tmp_path / "o", *STEPS)
    err = capsys.readouterr().err
    assert "topic (20 records)" in err
    assert counts(err)["trained on"]["examples"] == "18"


def test_too_short_a_block_is_said_once_with_its_flag(place, tmp_path, capsys):
    prompts = ["?", *["?" * 200] * 52, "?"]
    records = [{"prompt": prompt, "completion": "no" * 90} for prompt in prompts]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = ["finetune", place / "m", tmp_path / "long.jsonl", "--out", tmp_path / "o", *STEPS]
    with pytest.raises(SystemExit):
        surgery(*words, "--block-size", 8)
    assert "→ give a larger --block-size" in capsys.readouterr().err
    surgery(*words, "--plan")
    err = capsys.readouterr().err
    assert err.count("no target ends a turn") == 1
    assert "47 of 48 examples" in err and "within 96" in err
