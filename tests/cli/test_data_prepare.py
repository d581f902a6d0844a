"""`surgery data prepare`, and what trains on its folders: in this process, but for the kill."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.cli.framework.app import run
from nanogpt_surgery.data.text import preparation
from nanogpt_surgery.data.text.processes import in_processes
from nanogpt_surgery.data.text.token_files import open_tokens
from nanogpt_surgery.files.atomic import file_hash
from nanogpt_surgery.runs import data as runs_data

TEXT = "".join(f"verse {i}: to be or not to be, {i * i} times\n" for i in range(120))
OTHER = "".join(f"rule {i} of the other text is {i % 7}\n" for i in range(90))
SMALL = "--n-embd 16 --n-head 2 --n-layer 2 --block-size 12 --batch-size 4 --warmup-steps 1".split()
STEPS = "--max-steps 4 --evaluate-every 2".split()


def surgery(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict, str]:
    """The JSON on stdout, and what was said."""
    capsys.readouterr()
    run([*map(str, arguments), "--json"])
    out, said = capsys.readouterr()
    return json.loads(out), said


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit, match="1"):
        run([*map(str, arguments)])
    out, said = capsys.readouterr()
    assert out == ""
    return said


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    Path("b.txt").write_text(OTHER)
    return tmp_path


@pytest.fixture
def tokens(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    surgery(capsys, "data", "prepare", "a.txt", "b.txt", "--out", "tokens", "--workers", 1)
    return place / "tokens"


def test_prepare_says_what_it_made_and_checks_it_again(place, tokens, capsys):
    arguments = ["data", "prepare", "a.txt", "b.txt", "--out", "tokens"]
    report, said = surgery(capsys, *arguments)
    assert report["dtype"] == "uint16"
    assert report["train_tokens"] + report["validation_tokens"] == len(TEXT) + 1 + len(OTHER)
    assert 0.07 < report["validation_tokens"] / report["train_tokens"] < 0.13
    assert "every byte is as it was written" in said
    data = bytearray((tokens / "train.bin").read_bytes())
    data[100] ^= 1
    (tokens / "train.bin").write_bytes(data)
    assert "differs in its sha256" in refused(capsys, *arguments)
    assert "held_out differs" in refused(capsys, *arguments, "--held-out", 0.5)
    assert "--out FOLDER" in refused(capsys, "data", "prepare", "--out", "tokens")
    assert "is no folder of tokens" in refused(capsys, "data", "prepare", "a.txt", "--out", ".")


def test_training_on_ids_maps_them_and_notices_other_ones(place, tokens, capsys):
    arguments = ["train", "tokens", "--out", "run", *SMALL, *STEPS]
    report, _ = surgery(capsys, *arguments)
    assert report["steps"] == 4
    assert 0 < report["utilisation"] < 1
    assert report["matmul_GFLOPs"] > 0
    described = json.loads(Path("run/run.json").read_text())
    fingerprint = open_tokens(tokens).header.fingerprint()
    assert described["train_ids"] == f"train of {fingerprint}"
    tuned, _ = surgery(capsys, "finetune", "run", "tokens", "--out", "adapter", *STEPS)
    assert tuned["steps"] == 4
    surgery(capsys, "data", "prepare", "b.txt", "a.txt", "--out", "others", "--workers", 1)
    others = ["train", "others", *arguments[2:], "--resume"]
    assert "text was tokens and is others" in refused(capsys, *others)
    assert surgery(capsys, *arguments, "--resume")[0]["steps"] == 4


def test_ids_of_another_tokenizer_are_refused(place, tokens, capsys):
    surgery(capsys, "train", "b.txt", "--out", "run", *SMALL, *STEPS)
    said = refused(capsys, "finetune", "run", "tokens", "--out", "adapter", *STEPS)
    assert "made by another tokenizer" in said
    assert not Path("adapter").exists()


def test_a_mixture_draws_in_proportion(place, tokens, capsys):
    arguments = ["train", "a.txt", "b.txt", *SMALL, *STEPS, "--mix"]
    report, said = surgery(capsys, *arguments, "3:1", "--out", "run")
    reads = [
        4 * 4 * share * 12 / (int(len(text) * 0.9) - 1)
        for share, text in ((0.75, TEXT), (0.25, OTHER))
    ]
    assert report["epochs"] == ", ".join(f"{read:.3g}" for read in reads)
    assert f"a.txt: read {reads[0]:.3g} times" in said
    assert json.loads(Path("run/run.json").read_text())["train_ids"]["rows"] == [768, 256]
    mixed = ["train", "tokens", "a.txt", *SMALL, *STEPS]
    assert surgery(capsys, *mixed, "--mix", "1:2", "--out", "mixed")[0]["steps"] == 4
    assert "--mix 3:1" in refused(capsys, *mixed, "--out", "no")
    for weights, chunk in (("3", "1 weights for 2"), ("3:x", "no weights"), ("3:0", "above 0")):
        assert chunk in refused(capsys, *arguments, weights, "--out", "no")
    assert "2 weights for 0" in refused(capsys, "train", "--mix", "1:2", "--out", "no")
    assert not Path("no").exists()


def test_a_plan_touches_nothing(place, capsys):
    before = {path.name for path in place.iterdir()}
    words = ["train", "a.txt", "--out", "run", *SMALL, *STEPS]
    muon, _ = surgery(capsys, *words, "--plan")
    plan, _ = surgery(capsys, *words, "--no-muon", "--plan")
    assert {path.name for path in place.iterdir()} == before
    assert plan["trained_parameters"] == plan["parameters"] > 0
    assert plan["weights_bytes"] == plan["gradient_bytes"] == 4 * plan["parameters"]
    assert plan["optimizer_bytes"] == 2 * plan["weights_bytes"]  # AdamW keeps two numbers of each
    assert muon["optimizer_bytes"] < plan["optimizer_bytes"], "and Muon one"
    assert plan["tokens"] == 4 * 4 * 12
    assert plan["evaluations"] == 2
    assert plan["seconds"] > 0
    run(words)
    less, _ = surgery(capsys, "finetune", "run", "a.txt", "--out", "x", "--plan", *STEPS)
    assert less["trained_parameters"] < less["parameters"] / 4
    assert not Path("x").exists()


def start_preparing(folder: Path) -> subprocess.Popen:
    """`surgery data prepare` in a process of its own, as soon as a part is finished.

    It never joins the parts, so it is not done before it is killed.
    """
    program = (
        "import signal\n"
        "from nanogpt_surgery.cli import main\n"
        "from nanogpt_surgery.data.text import preparation\n"
        "preparation.join_parts = lambda *_: signal.pause()\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, "data", "prepare", "long.txt"]
    command += ["--out", folder.name, "--workers", "1"]
    process = subprocess.Popen(command, cwd=folder.parent, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600
    while not list(folder.parent.glob(f".tmp-{folder.name}-*/parts/*.json")):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "no part within the time"
        time.sleep(0.002)
    return process


def test_killed_on_the_command_line_it_goes_on(place, capsys):
    Path("long.txt").write_text(TEXT * 7000)
    process = start_preparing(place / "cut")
    process.kill()
    process.communicate()
    assert not Path("cut").exists(), "it was killed before the end"
    for folder in ("cut", "whole"):
        surgery(capsys, "data", "prepare", "long.txt", "--out", folder, "--workers", 1)
    for name in ("tokens.json", "train.bin", "validation.bin"):
        assert file_hash(Path("cut") / name) == file_hash(Path("whole") / name)
    assert sorted(p.name for p in Path("cut").iterdir()) == sorted(
        p.name for p in Path("whole").iterdir()
    )


def test_errors_pass_between_processes_whole():
    error = SurgeryError("what", "hint")
    again = error.__reduce__()[0](*error.__reduce__()[1])
    again.__dict__.update(error.__reduce__()[2])
    assert (str(again), again.what, again.hint) == (str(error), "what", "hint")


def test_a_full_disk_is_said_and_leaves_nothing_half_written(place, capsys):
    Path("long.txt").write_text(TEXT * 400)
    arguments = ["data", "prepare", "long.txt", "--out", "tokens", "--workers", 1]
    surgery(capsys, *arguments[:-3], "other", "--workers", 1)
    whole = Path("other/train.bin").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole // 2, before[1]))
    try:
        said = refused(capsys, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "could not write" in said
    assert "bytes free there" in said
    assert not list(Path("tokens").rglob(".tmp-*"))
    surgery(capsys, *arguments)
    for name in ("tokens.json", "train.bin", "validation.bin"):
        assert file_hash(Path("tokens") / name) == file_hash(Path("other") / name)


@pytest.mark.parametrize("name", ["verify_tokens", "characters_of"])
def test_ctrl_c_at_any_moment_says_that_the_same_command_goes_on(place, capsys, monkeypatch, name):
    arguments = ["data", "prepare", "a.txt", "--out", "tokens", "--workers", 1]
    if name == "verify_tokens":
        surgery(capsys, *arguments)
    monkeypatch.setattr(runs_data, name, lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match="130"):
        run(list(map(str, arguments)))
    assert "goes on with tokens" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert surgery(capsys, *arguments)[0]["train_tokens"] > 0


def test_parts_that_a_kill_left_behind_go(place, tokens, capsys):
    (tokens / "parts").mkdir()
    (tokens / "parts" / "00000.json").write_text("{}")
    surgery(capsys, "data", "prepare", "a.txt", "b.txt", "--out", "tokens")
    assert not (tokens / "parts").exists()


def test_a_process_that_is_ended_from_outside_is_said():
    with pytest.raises(SurgeryError, match=r"2 processes(.|\n)*workers"):
        list(in_processes(os._exit, [1, 1], 2))


def test_a_folder_inside_the_corpus_is_refused(place, capsys):
    (place / "corpus").mkdir()
    (place / "a.txt").rename(place / "corpus" / "a.txt")
    said = refused(capsys, "data", "prepare", "corpus", "--out", "corpus/tokens")
    assert "corpus/tokens lies in corpus" in said
    assert not (place / "corpus" / "tokens").exists()


def test_a_lost_tokenizer_and_a_negative_number_of_workers_are_said(place, tokens, capsys):
    words = ["data", "prepare", "a.txt", "b.txt", "--out"]
    assert "workers is -1" in refused(capsys, *words, "other", "--workers", -1)
    (tokens / "tokenizer" / "tokenizer.json").unlink()
    assert "holds no tokenizer.json" in refused(capsys, *words, "tokens")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("wrong", ["not UTF-8", "workers", "no tokenizer"])
def test_a_failed_preparation_leaves_nothing(place, capsys, wrong):
    Path("bad.txt").write_bytes(b"good\n" * 9 + b"\xff\n")
    words = {
        "not UTF-8": ["bad.txt"],
        "workers": ["a.txt", "--workers", -1],
        "no tokenizer": ["a.txt", "--tokenizer", "nowhere"],
    }
    before = names(place)
    refused(capsys, "data", "prepare", *words[wrong], "--out", "tokens")
    assert names(place) == before
    assert surgery(capsys, "data", "prepare", "a.txt", "--out", "tokens")[0]["train_tokens"] > 0


@pytest.mark.parametrize("text", ["a.txt", "b.txt"])
def test_ctrl_c_leaves_temporary_names_alone_which_the_next_command_takes_or_removes(
    place, capsys, monkeypatch, text
):
    before = names(place)
    monkeypatch.setattr(preparation, "join_parts", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run(["data", "prepare", "a.txt", "--out", "tokens", "--workers", "1"])
    monkeypatch.undo()
    monkeypatch.chdir(place)
    (left,) = set(names(place)) - set(before)
    assert left.startswith(".tmp-tokens-")
    assert list(Path(left).glob("parts/*.json"))
    surgery(capsys, "data", "prepare", text, "--out", "tokens", "--workers", 1)
    assert names(place) == sorted([*before, "tokens"])
    surgery(capsys, "data", "prepare", text, "--out", "anew", "--workers", 1)
    for name in ("tokens.json", "train.bin", "validation.bin"):
        assert file_hash(Path("tokens") / name) == file_hash(Path("anew") / name)
