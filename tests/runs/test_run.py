"""A run as a library: begun, stopped, resumed, summed up, without the command line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.training import DATASET, SETTINGS, TOKENIZER, VALIDATION, hashes, model_of

from nanogpt_surgery import LoRASettings, Run, SurgeryError, Training, inject_lora, open_model
from nanogpt_surgery.files import atomic
from nanogpt_surgery.files.atomic import file_hash
from nanogpt_surgery.formats.folders.run_folder import checkpoints
from nanogpt_surgery.history.folder_history import read_journal
from nanogpt_surgery.history.journal import SETTLED
from nanogpt_surgery.runs.checkpoints import read_metrics
from nanogpt_surgery.runs.description import RunDiffersError
from nanogpt_surgery.runs.training import fingerprint

SHORT = replace(SETTINGS, max_steps=6, evaluate_every=3, device="cpu", precision="float32")


def training_of(seed: int = 0, **changes: object) -> Training:
    settings = replace(SHORT, **changes)
    return Training.of_model(model_of(seed=seed), TOKENIZER, (DATASET, VALIDATION), settings)


def test_a_run_is_trained_recorded_saved_and_signed_off(tmp_path: Path) -> None:
    lines: list[str] = []
    with Run.begin(tmp_path / "run", training_of(), say=lines.append) as run:
        steps = list(run.train())
        summary = run.finish()
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows[1:]] == [step.loss for step in steps]
    assert summary["steps"] == 6
    assert summary["validation_loss"] == steps[-1].validation_loss
    assert not run.stopped and not run.stopped_early
    assert any("validation loss" in line for line in lines)
    assert (tmp_path / "run" / "loss.png").is_file()
    assert [entry.state for entry in read_journal(tmp_path / "run").operations] == [SETTLED]
    model, tokenizer = open_model(tmp_path / "run")
    assert tokenizer is not None
    assert model.n_parameters == model_of().n_parameters


def test_each_file_of_a_run_is_hashed_once_when_it_is_opened(tmp_path: Path, monkeypatch) -> None:
    with Run.begin(tmp_path / "run", training_of()) as run:
        list(run.train())
    hashed: list[Path] = []
    monkeypatch.setattr(atomic, "file_hash", lambda path: hashed.append(path) or file_hash(path))
    open_model(tmp_path / "run")
    assert len(hashed) == len(set(hashed))
    assert "model.safetensors" in [path.name for path in hashed]


def test_a_stopped_run_goes_on_to_the_bits_of_an_unbroken_one(tmp_path: Path) -> None:
    with Run.begin(tmp_path / "whole", training_of()) as run:
        whole = [step.loss for step in run.train()]
    with Run.begin(tmp_path / "cut", training_of()) as run:
        losses = []
        for step in run.train():
            losses.append(step.loss)
            if step.step == 2:
                run.stop()
        assert run.stopped == 1
    assert len(losses) == 2
    with Run.resume(tmp_path / "cut", training_of()) as run:
        assert run.folder.first_step == 2
        losses += [step.loss for step in run.train()]
        assert hashes(run.training.model)
    assert losses == whole
    last = [checkpoints(tmp_path / name)[-1] / "model.safetensors" for name in ("whole", "cut")]
    assert file_hash(last[0]) == file_hash(last[1])


def test_a_loop_that_is_left_has_recorded_what_it_saw(tmp_path: Path) -> None:
    with Run.begin(tmp_path / "run", training_of()) as run:
        for step in run.train():
            if step.step == 4:
                break
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]


def test_an_adapter_is_a_run_too(tmp_path: Path) -> None:
    model, adapter = model_of(), LoRASettings(rank=2)
    base = fingerprint(model.state_dict().values())
    torch.manual_seed(3)
    report = inject_lora(model, "q_proj", settings=adapter)
    data = DATASET, VALIDATION
    training = Training.of_adapter(model, TOKENIZER, data, SHORT, report, adapter, "m", base)
    with Run.begin(tmp_path / "run", training) as run:
        list(run.train())
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_a_run_that_is_there_is_not_begun_again_nor_gone_on_with_as_another(tmp_path: Path) -> None:
    with Run.begin(tmp_path / "run", training_of()) as run:
        list(run.train())
    with pytest.raises(SurgeryError, match="run"), Run.begin(tmp_path / "run", training_of()):
        pass
    other = training_of(max_steps=9)
    with pytest.raises(RunDiffersError, match="max_steps was 6 and is 9"):  # noqa: SIM117
        with Run.resume(tmp_path / "run", other):
            pass
