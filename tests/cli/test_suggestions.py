"""What other programs call a thing leads to what it is called here."""

from pathlib import Path

import pytest
from helpers.commands import called

from nanogpt_surgery.cli.framework.app import COMMANDS, GROUPS, make_app
from nanogpt_surgery.cli.framework.suggestions import meanings, suggested, with_flags

MEANT = {
    "train": {
        "--lr": "--learning-rate",
        "--bs": "--batch-size",
        "--gradient-accumulation-steps": "--grad-accum-steps",
        "--accumulation": "--grad-accum-steps",
        "--clip": "--max-grad-norm",
        "--max-iters": "--max-steps",
        "--bf16": "--precision",
        "--eval-steps": "--evaluate-every",
        "--max-seq-length": "--block-size",
        "--from": "--init-from",
        "--weights": "--mix",
        "-o": "--out",
        "--hidden-size": "--n-embd",
    },
    "finetune": {
        "--per-device-train-batch-size": "--batch-size",
        "--lora-r": "--rank",
        "--r": "--rank",
        "--lora-alpha": "--alpha",
        "--lora-dropout": "--dropout",
        "--target-modules": "--targets",
        "--target_modules": "--targets",
        "--output-dir": "--out",
        "--max-length": "--block-size",
        "--fp16": "--precision",
    },
    "generate": {
        "--max-tokens": "--max-new-tokens",
        "--max-length": "--max-new-tokens",
        "--temp": "--temperature",
        "--bf16": "--dtype",
        "--repeat-penalty": "--repetition-penalty",
        "--lora": "--adapter",
    },
    "eval": {"--n-ctx": "--context"},
    "export": {
        "--form": "--format",
        "--output-format": "--format",
        "--outtype": "--format",
        "--outfile": "--out",
    },
    "chat": {"--system-prompt": "--system"},
    "data prepare": {"--num-proc": "--workers", "--val-split": "--held-out"},
}
COMING = ("--epochs", "--patience", "--sample-every", "--save-every")  # with the work on `train`
COMMANDS_MEANT = {
    "server": "serve",
    "talk": "chat",
    "run": "generate",
    "ft": "finetune",
    "lora": "finetune",
    "sft": "finetune",
    "convert": "export",
    "quantize": "export",
    "pretrain": "train",
}


def flags_of(command: str) -> set[str]:
    """Every flag of a command."""
    app = make_app()
    for word in command.split():
        app = app[word]
    names = (name for argument in app.assemble_argument_collection() for name in argument.names)
    return {name for name in names if name.startswith("--")}


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    groups = {f"{group} {name}" for group, (_, names) in GROUPS.items() for name in names}
    return {command: flags_of(command) for command in [*COMMANDS, *groups] if command not in GROUPS}


@pytest.mark.parametrize(
    ("command", "written", "meant"),
    [(command, *pair) for command, pairs in MEANT.items() for pair in pairs.items()],
)
def test_a_flag_of_another_program_is_understood(command, written, meant, flags):
    assert meant in flags[command]
    assert suggested("flags", written, flags[command]) == meant
    assert suggested("flags", f"{written}=3", flags[command]) == meant


def test_every_flag_that_is_suggested_is_one_of_some_command(flags):
    there = set().union(*flags.values(), COMING)
    assert not [flag for found in meanings("flags").values() for flag in found if flag not in there]


def test_no_flag_of_ours_is_taken_for_another(flags):
    """The flag of a command itself is never among the words for something else in that command."""
    known = meanings("flags")
    assert [f for found in flags.values() for f in found if f in known.get(f[2:], [])] == []


def test_every_command_that_is_suggested_is_there():
    for written, meant in COMMANDS_MEANT.items():
        assert suggested("commands", written, COMMANDS) == meant
    assert {c for found in meanings("commands").values() for c in found} <= set(COMMANDS)
    assert suggested("commands", "trian", COMMANDS) == "train"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train", "--lr", "3", "--out", "x"], "--learning-rate"),
        (["train", "--lr=3", "--out", "x"], "--learning-rate"),
        (["finetune", "m", "-o", "x"], "--out"),
        (["talk", "m"], "chat"),
        (["tokenizer", "trian"], "train"),
    ],
)
def test_the_command_line_says_it(words: list[str], meant: str) -> None:
    _, said = called(*words, check=1)
    assert words[1 if words[0] == "tokenizer" else 0] in said
    assert f"→ {meant}?" in said


def test_a_key_of_a_config_file_is_understood_alike(tmp_path: Path) -> None:
    config = tmp_path / "theirs.toml"
    config.write_text("max_steps = 3\ngradient_accumulation_steps = 4\n")
    _, said = called("train", "--out", tmp_path / "run", "--config", config, check=1)
    assert "line 2" in said
    assert "→ grad_accum_steps?" in said


@pytest.mark.parametrize(
    ("hint", "typed"),
    [
        ("force=True", "--force"),
        ("tied='untie' lets it", "--tied untie lets it"),
        ("evaluate_tokens=0 reads all", "--evaluate-tokens 0 reads all"),
        ("answers_only=False trains", "--no-answers-only trains"),
        ("out=FOLDER writes a new one", "--out FOLDER writes a new one"),
        ("open_model(p, dtype='float32'), force=True", "open_model(p, dtype='float32'), --force"),
        ("stop=['text']", "stop=['text']"),
        ("merge_adapter(m, a, out=FOLDER)", "surgery merge m a --out FOLDER"),
        ("undo_folder(runs/a) takes it back", "surgery undo runs/a takes it back"),
    ],
)
def test_a_setting_in_a_hint_of_the_library_becomes_its_flag(hint: str, typed: str) -> None:
    assert with_flags(hint) == typed
