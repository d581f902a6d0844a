"""`surgery finetune --stride`: windows side by side where frozen layers see each once."""

import json
from pathlib import Path

import pytest
from helpers.commands import LETTERS, called, write_model

TEXT = LETTERS * 30  # 2,880 characters, 2,592 of them to train on: 103 windows of 25
STEPS = "--max-steps 60 --batch-size 4 --block-size 25 --device cpu --json".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stride")
    write_model(folder / "base")
    (folder / "text.txt").write_text(TEXT)
    return folder


def planned(place: Path, *arguments: object) -> tuple[dict, str]:
    out, said = called(
        "finetune", place / "base", place / "text.txt", "--out", place / "none", "--plan",
        *STEPS, *arguments,
    )  # fmt: skip
    return json.loads(out), said


def test_by_default_the_head_s_training_sees_each_window_again(place: Path) -> None:
    plan, said = planned(place, "--targets", "lm_head")
    assert plan["hidden_states_bytes"] == 103 * 25 * 16 * 4
    assert "side by side" in said
    overlapping, said = planned(place, "--targets", "lm_head", "--stride", 1)
    assert overlapping["hidden_states_bytes"] == 0
    assert "side by side" not in said
    five, _ = planned(place, "--targets", "lm_head", "--stride", 20)
    assert five["hidden_states_bytes"] == 129 * 25 * 16 * 4


def test_where_the_first_layer_learns_windows_begin_at_every_token(place: Path) -> None:
    plan, said = planned(place, "--targets", "q_proj")
    assert plan["hidden_states_bytes"] == 0
    assert "side by side" not in said


def test_the_stride_belongs_to_a_run(place: Path) -> None:
    short = ["--max-steps", 2, *STEPS[2:], "--targets", "lm_head", "--out", place / "run"]
    begun = ["finetune", place / "base", place / "text.txt", *short]
    called(*begun)
    assert json.loads((place / "run" / "run.json").read_text())["stride"] == 25
    called(*begun, "--resume")
    _, said = called(*begun, "--resume", "--stride", 3, check=1)
    assert "stride was 25 and is 3\n" in said


def test_instruction_data_has_none(place: Path) -> None:
    (place / "answers.jsonl").write_text(12 * '{"prompt": "a?", "completion": "b"}\n')
    wanted = ["finetune", place / "base", place / "answers.jsonl", "--out", place / "no", *STEPS]
    _, said = called(*wanted, "--stride", 3, check=1)
    assert "instruction data" in said
    assert not (place / "no").exists()


def test_a_run_begun_before_there_were_strides_had_windows_at_every_token(place: Path) -> None:
    short = ["--max-steps", 2, *STEPS[2:], "--targets", "lm_head", "--out", place / "old"]
    begun = ["finetune", place / "base", place / "text.txt", *short]
    called(*begun, "--stride", 1)
    path = place / "old" / "run.json"
    description = json.loads(path.read_text())
    assert description.pop("stride") == 1
    path.write_text(json.dumps(description))
    called(*begun, "--resume", "--stride", 1)
    _, said = called(*begun, "--resume", check=1)
    assert "--stride 1" in said
