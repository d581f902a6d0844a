"""The commands as a user types them; in processes of their own where that is what matters."""

import json
import os
import pty
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from helpers.commands import called, surgery, until_closed

from nanogpt_surgery import generate, inject_lora, open_model, save_adapter
from nanogpt_surgery.files.atomic import file_hash

TEXT = "to be, or not to be: that is the question.\n" * 40
SMALL = "--n-embd 16 --n-head 2 --n-layer 2 --block-size 12 --batch-size 4 --warmup-steps 1".split()
STEPS = "--max-steps 6 --evaluate-every 3".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a trained run and an adapter."""
    place = tmp_path_factory.mktemp("cli")
    (place / "text.txt").write_text(TEXT)
    arguments = ["--out", "adapter", *STEPS, "--targets", "q_proj", "lm_head", "--rank", 3]
    with chdir(place):
        called("train", "text.txt", "--out", "run", *SMALL, *STEPS)
        called("finetune", "run", "text.txt", *arguments)
    return place


@pytest.fixture
def folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, and commands are typed in it."""
    monkeypatch.chdir(trained)
    return trained


def test_a_run_folder_holds_everything(folder: Path) -> None:
    names = {path.name for path in (folder / "run").iterdir()}
    assert {"run.json", "metrics.jsonl", "loss.png", "LATEST", "BEST", "checkpoints"} <= names
    assert (folder / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]


def test_data_goes_to_stdout_and_progress_to_stderr(folder: Path) -> None:
    done = surgery("train", "text.txt", "--out", "run", *SMALL, *STEPS, "--resume")
    assert done.stdout.startswith("trained\n")
    assert "going on from step 6 of 6" in done.stderr
    assert "computing on" in done.stderr


def test_progress_says_loss_rate_and_time_left(folder: Path, tmp_path: Path) -> None:
    words = ["text.txt", "--out", tmp_path / "r", *SMALL, *STEPS, "--json"]
    out, said = called("train", *words)
    report = json.loads(out)
    assert report["steps"] == 6
    assert 0 < report["seconds_of_steps"] < report["seconds_in_all"]
    *_, last = [line for line in said.splitlines() if line.startswith("step 6 of 6")]
    rate = int(last.split(" tokens/s")[0].split()[-1].replace(",", ""))
    assert rate == report["tokens_per_second"], "one rate, whether evaluations are long or not"
    assert "\x1b" not in said, "plain lines where stderr is no terminal"
    for piece in ("step 3 of 6", "loss ", "tokens/s", "left", "validation loss"):
        assert piece in said


def test_a_bar_says_when_it_evaluates(folder: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = ["train", folder / "text.txt", "--out", tmp_path / "r", *SMALL, *STEPS]
    command = [sys.executable, "-m", "nanogpt_surgery", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = until_closed(ours)
    assert process.wait(timeout=600) == 0
    assert b"evaluating" in shown
    assert b"step 6 of 6" in shown


def test_generate_continues_the_prompt(folder: Path) -> None:
    arguments = ["--prompt", "to be", "--max-new-tokens", 5, "--seed", 1]
    plain = called("generate", "run", *arguments)[0]
    assert plain.startswith("to be")
    assert len(plain) == len("to be") + 5 + 1
    assert plain == surgery("generate", "run", *arguments).stdout
    adapted = called("generate", "run", "--adapter", "adapter", *arguments)[0]
    assert adapted.startswith("to be")


def test_inspect_a_model(folder: Path) -> None:
    report = json.loads(called("inspect", "run", "--json")[0])
    rows = {row["module"]: row for row in report["rows"]}
    model, _ = open_model(folder / "run")
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert rows["lm_head"] == {
        "module": "lm_head",
        "kind": "Linear",
        "shape": f"{model.config.vocab_size}×16",
        "parameters": model.config.vocab_size * 16,
        "dtype": "float32",
    }


def test_inspect_an_adapter(folder: Path) -> None:
    report = json.loads(called("inspect", "adapter", "--json")[0])
    rows = {row["layer"]: row for row in report["rows"]}
    assert "lm_head" in rows
    assert all(0 < row["rank of ΔW"] <= row["r"] for row in rows.values())
    assert all(row["norm of ΔW"] > 0 for row in rows.values())


def test_merge_writes_what_it_computed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    report = json.loads(called("merge", "run", "adapter", "--out", out, "--json")[0])
    assert report["largest_error"] <= 1e-5 * report["largest_logit"]
    assert file_hash(out / "model.safetensors") != file_hash(folder / "run" / "model.safetensors")
    arguments = ["--prompt", "to be", "--max-new-tokens", 5, "--temperature", 0]
    merged = called("generate", out, *arguments)[0]
    adapted = called("generate", "run", "--adapter", "adapter", *arguments)[0]
    assert merged == adapted


def test_plan_says_what_finetune_would_train(folder: Path) -> None:
    arguments = ["--targets", "q_proj", "lm_head", "--rank", 3, "--json"]
    report = json.loads(called("plan", "run", *arguments)[0])
    trained = json.loads((folder / "adapter" / "run.json").read_text())["lora"]
    assert report["trainable_parameters"] == trained["trainable_parameters"]
    assert [row["layer"] for row in report["rows"]] == [row["layer"] for row in trained["rows"]]
    assert all(row["shape"] and row["bytes"] > 0 for row in report["rows"])
    size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert report["adapter_bytes"] == size


def test_export_writes_what_opens_again(folder: Path, tmp_path: Path) -> None:
    tanh = ["--out", "tanh", "--mlp", "gelu_tanh"]
    called("train", "text.txt", *tanh, *SMALL, *STEPS)
    called("export", "tanh", "--format", "F32", "--out", tmp_path / "m.gguf")
    prompt = [1, 2, 3]
    models = [open_model(path)[0] for path in (folder / "tanh", tmp_path / "m.gguf")]
    first, second = (list(generate(model, prompt, 8, temperature=0)) for model in models)
    assert first == second
    half, tuned = tmp_path / "h.gguf", tmp_path / "tuned"
    called("export", "tanh", "--format", "F16", "--out", half)
    called("finetune", half, "text.txt", "--out", tuned, *STEPS)
    arguments = ["--adapter", tuned, "--prompt", "to be", "--max-new-tokens", 4]
    assert called("generate", half, *arguments)[0].startswith("to be")
    _, said = called("export", "run", "--out", tmp_path / "e.gguf", check=1)
    assert "gelu_tanh" in said
    form = ["--format", "lora-gguf", "--out", tmp_path / "a.gguf"]
    assert "add --adapter" in called("export", "run", *form, check=1)[1]
    called("export", "run", "--adapter", "adapter", *form)
    assert (tmp_path / "a.gguf").read_bytes().startswith(b"GGUF")


def test_doctor() -> None:
    report = json.loads(called("doctor", "--json")[0])
    assert report["float32_matmul_GFLOPs"] > 0
    assert "threads" in report["training_would_use"] or report["training_would_use"]


def test_an_unknown_character_is_refused_before_anything_is_printed(folder: Path) -> None:
    out, said = called("generate", "run", "--prompt", "to bé", check=1)
    assert "U+00E9" in said
    assert out == ""


def test_an_adapter_is_not_a_model(folder: Path) -> None:
    _, said = called("generate", "adapter", check=1)
    assert "is an adapter, not a model" in said


def test_merging_over_its_own_parts_is_refused(folder: Path) -> None:
    before = file_hash(folder / "run" / "model.safetensors")
    for part in ("run", "adapter"):
        called("merge", "run", "adapter", "--out", part, check=1)
    assert file_hash(folder / "run" / "model.safetensors") == before


def test_a_pattern_without_a_match_lists_the_nearest(folder: Path, tmp_path: Path) -> None:
    arguments = ["run", "text.txt", "--out", tmp_path / "a", "--targets", "q_prj"]
    _, said = called("finetune", *arguments, check=1)
    assert "q_prj" in said
    assert "nearest: q_proj" in said
    assert not (tmp_path / "a").exists()


def test_finetune_resumes(folder: Path, tmp_path: Path) -> None:
    arguments = ["run", "text.txt", *STEPS]
    for out in ("whole", "cut"):
        called("finetune", *arguments, "--out", tmp_path / out)
    newest = tmp_path / "cut" / "checkpoints" / "step-00000006"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    called("finetune", *arguments, "--out", tmp_path / "cut", "--resume")
    name = "adapter_model.safetensors"
    assert file_hash(tmp_path / "cut" / name) == file_hash(tmp_path / "whole" / name)


def test_an_adapter_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    model, _ = open_model(folder / "run")
    inject_lora(model, "up_proj")
    save_adapter(model, tmp_path / "up")
    config = json.loads((tmp_path / "up" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    narrow = [word.replace("16", "8") for word in SMALL]
    called("train", "text.txt", "--out", tmp_path / "other", *narrow, *STEPS)
    _, said = called("merge", tmp_path / "other", tmp_path / "up", "--out", tmp_path / "m", check=1)
    assert "another model" in said
    assert not (tmp_path / "m").exists()
