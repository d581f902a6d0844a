"""Flags, their help, a file in their place, and what is said of wrong ones."""

import io
import json
import os
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
from helpers.commands import called, surgery

from nanogpt_surgery import inject_lora
from nanogpt_surgery.cli.commands.data import prepare
from nanogpt_surgery.cli.commands.folders import MergeOptions, merge
from nanogpt_surgery.cli.framework.app import COMMANDS
from nanogpt_surgery.data.text.preparation import prepare_tokens
from nanogpt_surgery.formats.folders.merging import merge_adapter, merge_into_gguf

TEXT = "to be, or not to be: that is the question.\n" * 40


def test_help_answers_for_every_command_without_torch() -> None:
    program = (
        "import sys\nfrom nanogpt_surgery.cli.framework.app import run\n"
        "for words in (['--help'], *([c, '--help'] for c in sys.argv[1:])):\n    run(words)\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    commands = [*COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", program, *commands], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for command in commands:
        assert f"surgery {command}" in done.stdout


def test_defaults_in_the_help_are_the_librarys() -> None:
    from nanogpt_surgery import FitSettings, GPTConfig

    text = " ".join(surgery("train", "--help", env=os.environ | {"COLUMNS": "300"}).stdout.split())
    assert f"optimizer steps in all [default: {FitSettings().max_steps}]" in text
    assert f"[default: {GPTConfig(1).n_embd}]" in text


def test_a_config_file_has_the_same_keys(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    config = tmp_path / "small.toml"
    config.write_text(
        f'out = "{tmp_path}/run"\nn_embd = 16\nn_head = 2\nn_layer = 1\nblock_size = 12\n'
        "max_steps = 2\npositions = 'rotary'\n"
    )
    arguments = ["--config", config, "--max-steps", 3]
    called("train", tmp_path / "text.txt", *arguments)
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["model"]["positions"] == "rotary"
    assert written["settings"]["max_steps"] == 3, "the command line counts over the file"


@pytest.mark.parametrize(
    ("words", "line", "said"),
    [
        (["train", "text.txt", "--out", "run"], 'tokenizer = "nowhere"', "nowhere"),
        (["finetune", "nowhere", "text.txt", "--out", "run"], 'data = "audio"', "audio"),
        (["data", "prepare", "text.txt", "--out", "ids"], "workers = -3", "-3"),
    ],
)
def test_a_key_that_is_also_a_command_counts(
    words: list[str], line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    Path("own.toml").write_text(line)
    assert said in called(*words, "--config", "own.toml", check=1)[1]


def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    config = tmp_path / "wrong.toml"
    config.write_text("max_steps = 3\n\nn_embed = 16\n")
    _, said = called("train", "--out", tmp_path / "run", "--config", config, check=1)
    assert "n_embed" in said
    assert "n_embd" in said
    assert "line 3" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["generate", "nowhere"], ["nowhere", "no such folder", "→ "]),
        (["train", "nowhere.txt", "--out", "r"], ["nowhere.txt"]),
        (["train", "--out", "r", "--n-embd", "10", "--n-head", "4"], ["10", "4", "multiple"]),
        (["train", "--out", "r", "--n-embed", "10"], ["--n-embed", "→ --n-embd"]),
        (["finetune", "nowhere", "--out", "a"], ["nowhere"]),
        (["inspect", "."], ["surgery: . is neither"]),
        (["--config"], ["--config"]),
        (["train"], ["train needs --out PATH\n", "train --help"]),
        (["train", "--out"], ["surgery: train needs --out PATH\n"]),
        (["generate"], ["surgery: generate needs a MODEL\n", "generate --help"]),
        (["merge", "m"], ["surgery: merge needs an ADAPTER\n"]),
        (["train", "short.txt", "--out", "r"], ["last tenth", "257", "--block-size"]),
        (["train", "short.txt", "--out", "/proc/r", "--block-size", "2"], ["/proc/r"]),
    ],
)
def test_errors_are_sentences(
    arguments: list[str], pieces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text(TEXT[:500])
    out, said = called(*arguments, check=1)
    assert "Traceback" not in said
    for piece in pieces:
        assert piece in said
    assert out == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = surgery("inspect", "nowhere", "--debug", check=1, cwd=tmp_path)
    assert "Traceback" in done.stderr


def test_escapes_in_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    done = surgery("inspect", tmp_path / "a\x1b[31mb", check=1)
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    assert "\\u001b" in done.stderr


def test_a_hyphen_is_standard_input(tmp_path, monkeypatch):
    """For cyclopts it looks like a flag."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"to be or not to be. " * 40)))
    sizes = ["--n-embd", 8, "--n-head", 2, "--n-layer", 1, "--block-size", 8, "--max-steps", 1]
    _, said = called("train", "-", "--out", tmp_path / "run", *sizes)
    assert re.search(r"712 windows.*72 held out.*719 and 79", said)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"to be")))
    words = ["--prompt", "-", "--max-new-tokens", 1, "--temperature", 0]
    assert called("generate", tmp_path / "run", *words)[0].startswith("to be")
    assert "Unused Tokens: ['standard input']" in called("undo", "a", "-", check=1)[1]


def test_a_default_written_in_a_command_is_the_library_s() -> None:
    for source, function, names in (
        (merge, merge_adapter, ("dtype",)),
        (MergeOptions, merge_into_gguf, ("tolerance", "force", "tied")),
        (prepare, prepare_tokens, ("held_out", "workers")),
    ):
        ours, theirs = signature(source).parameters, signature(function).parameters
        assert [ours[n].default for n in names] == [theirs[n].default for n in names]
    targets = signature(inject_lora).parameters["targets"].default
    assert f"[default: {' '.join(targets)}]" in called("plan", "--help")[0]


def test_flags_are_read_where_pydantic_is_loaded():
    """Cyclopts then has it check every default; openai brings it into the tests' process."""
    import pydantic

    from nanogpt_surgery.cli.framework.app import _parsed, make_app

    assert pydantic
    for words in (["finetune", "a", "--out", "b"], ["train", "--out", "b"], ["plan", "a"]):
        command, _, _ = _parsed(make_app(), words)
        assert command == tuple(words[:1])
