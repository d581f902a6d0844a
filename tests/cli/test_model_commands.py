"""`surgery model …`: planned, done in place and elsewhere, taken back."""

import json

import pytest
from helpers.commands import LETTERS, called, write_model

from nanogpt_surgery import open_model
from nanogpt_surgery.history.folder_history import hashes_of


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "m")
    (tmp_path / "text").write_text("The lazy fox. " * 60)
    return tmp_path / "m"


def report_of(*arguments):
    return json.loads(called("model", *arguments, "--json")[0])


def test_layers_go_and_come_back(folder):
    before = hashes_of(folder)
    planned = report_of("prune", folder, "--layers", 1, "--plan")
    assert hashes_of(folder) == before
    done = report_of("prune", folder, "--layers", 1, "--probe", folder.parent / "text")
    assert done["rows"] == planned["rows"]
    assert (done["layers"], done["parameters_after"]) == (1, planned["parameters_after"])
    assert done["kl"] > 0
    assert "256 tokens of the text" in done["measured_on"]
    assert len(open_model(folder)[0].layers) == 1
    _, said = called("model", "duplicate", folder, "--layers", 0, 0)
    assert f"surgery undo {folder}" in said
    assert len(open_model(folder)[0].layers) == 3
    called("undo", folder)
    called("undo", folder)
    assert hashes_of(folder) == before
    _, said = called("model", "prune", folder, "--layers", 5, check=1)
    assert "0 to 1" in said


def test_the_vocabulary_of_a_new_folder(folder, tmp_path):
    before, more, less = hashes_of(folder), tmp_path / "more", tmp_path / "less"
    table, said = called("model", "vocabulary", folder, "--add", "§", "é", "--out", more)
    assert "96" in table
    assert str(more) in said
    assert "32 random tokens" in " ".join(table.split())
    report = report_of("vocabulary", more, "--drop-unused", tmp_path / "text", "--out", less)
    model, tokenizer = open_model(less)
    kept = set((tmp_path / "text").read_text())
    assert model.config.vocab_size == tokenizer.vocab_size == len(kept)
    assert report["vocabulary_before"] == len(LETTERS) + 2
    assert hashes_of(folder) == before
    called("model", "vocabulary", folder, "--add", "§", "--out", more, check=1)
    called("model", "vocabulary", folder, "--add", "§", "--out", more, "--overwrite")
    assert open_model(more)[0].config.vocab_size == len(LETTERS) + 1


def test_what_does_not_go_together_is_refused(folder):
    before = hashes_of(folder)
    wrong = {
        ("--add", "§", "--drop-unused", "text"): "--add",
        (): "--add",
        ("--drop-unused", str(folder.parent / "text"), "--init", "mean"): "--init",
        ("--add", "e"): "'e'",
        ("--add", "§", "--drop-originals", "--out", str(folder)): "itself",
    }
    for words, named in wrong.items():
        _, said = called("model", "vocabulary", folder, *words, check=1)
        assert named in said
    assert hashes_of(folder) == before


def test_ranks_are_planned_under_a_budget_and_taken_by_other_commands(folder):
    text, ranks = folder.parent / "text", folder.parent / "ranks.toml"
    words = ["plan", folder, "--rank-budget", 400, "--text", text]
    report = json.loads(called(*words, "--json", "--out", ranks)[0])
    assert 0 < report["trainable_parameters"] <= 400
    assert sum(report["rank_pattern"].values()) == sum(row["rank"] for row in report["rows"])
    planned = json.loads(called("plan", folder, "--config", ranks, "--json")[0])
    assert planned["trainable_parameters"] == report["trainable_parameters"]
    assert {row["layer"]: row["rank"] for row in planned["rows"]} == report["rank_pattern"]
    one = called("plan", folder, "--targets", "q_proj", "--rank-budget", 64, "--text", text)[0]
    assert "q_proj" in one
    assert "up_proj" not in one
    called("plan", folder, "--rank-budget", 400, check=1)
    called("plan", folder, "--out", ranks, check=1)
    assert "already" in called(*words, "--out", ranks, check=1)[1]
