"""`surgery train --recipe fast`: its defaults are used, and flags beside it still count."""

import json
import math
from pathlib import Path

from helpers.commands import called

from nanogpt_surgery import FitSettings
from nanogpt_surgery.training.recipes import MUON


def test_the_recipe_trains_what_it_says_and_generates(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be, or not to be, that is the question\n" * 40)
    small = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 16 --max-steps 4".split()
    flags = [*small, "--recipe", "fast", "--momentum", "0.8"]
    called("train", "text.txt", "--out", "run", *flags)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["recipe"] == "fast"
    assert (run["settings"]["muon"], run["settings"]["momentum"]) == (True, 0.8)
    assert (run["model"]["n_prev_tokens"], run["model"]["mlp"]) == (3, "relu2")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    kinds = run["model"]["vocab_size"]
    assert abs(first["loss"] - math.log(kinds)) < 1e-4  # a head of zeros knows nothing
    words = ["--prompt", "to ", "--max-new-tokens", "20"]
    assert called("generate", "run", *words)[0].startswith("to ")


def test_without_a_recipe_muon_trains_and_without_muon_adamw_s_defaults_count(
    tmp_path: Path,
) -> None:
    (tmp_path / "text.txt").write_text("to be, or not to be, that is the question\n" * 40)
    small = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 16 --max-steps 2".split()
    words = ["train", tmp_path / "text.txt", *small]
    _, said = called(*words, "--out", tmp_path / "muon", "--max-grad-norm", 2)
    assert f"Muon, at a learning rate of {MUON['learning_rate']:g}" in said
    _, said = called(*words, "--out", tmp_path / "adamw", "--no-muon", "--max-grad-norm", 2)
    assert f"AdamW, at a learning rate of {FitSettings().learning_rate:g}" in said
    wanted = {"muon": FitSettings(**(MUON | {"max_steps": 2, "max_grad_norm": 2.0}))}
    wanted["adamw"] = FitSettings(max_steps=2, max_grad_norm=2.0)
    for name, settings in wanted.items():
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert run["settings"] == settings.to_dict()
        assert run["model"]["positions"] == "learned"


def test_tables_that_outgrow_the_model_are_said(tmp_path: Path) -> None:
    """Three for each kind of token: with 32,000 kinds they would be most of any small model."""
    (tmp_path / "text.txt").write_text("".join(map(chr, range(0x4E00, 0x5200))) * 2)
    small = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 16 --max-steps 2 --plan".split()
    words = ["train", tmp_path / "text.txt", "--out", tmp_path / "run", "--recipe", "fast", *small]
    _, said = called(*words)
    assert "49,152 of them are tables" in said and "--n-prev-tokens 0" in said
    _, said = called(*words, "--n-prev-tokens", 0)
    assert "tables of previous tokens" not in said


def test_what_was_typed_for_a_run_is_said_where_it_was_forgotten(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("book", "other"):
        (tmp_path / f"{name}.txt").write_text(f"to be, or not to be, that is the {name}\n" * 120)
    words = ["--out", "run", "--n-embd", 16, "--n-head", 2]
    flags = "--recipe fast --block-size 16 --n-layer 1 --max-steps 2 --evaluate-every 1".split()
    called("train", "book.txt", *words, *flags)
    _, said = called("train", "book.txt", *words, "--resume", check=1)
    assert "recipe was fast and is not given" in said
    assert "block_size was 16 and is 256" in said
    typed = said.partition("surgery train")[2].partition(";")[0].split()
    assert set(flags) < set(typed)
    assert "going on from step 2 of 2" in called("train", *typed, "--resume")[1]
    _, said = called("train", "other.txt", *words, *flags, "--resume", check=1)
    assert "text was book.txt and is other.txt" in said
    called("finetune", "run", "book.txt", "--out", "tuned", *flags[6:], "--rank", 2)
    tune = ["finetune", "run", "other.txt", "--out", "tuned", *flags[6:], "--resume"]
    _, said = called(*tune, check=1)
    assert "text was book.txt and is other.txt" in said
