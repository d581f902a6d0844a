"""Run folders: whole or not at all, resumed to the bit, verified, locked."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from nanogpt_surgery import (
    CharacterTokenizer,
    FitSettings,
    GPTDataset,
    SimpleGPT,
    SurgeryError,
    SurgeryWarning,
    fit,
    open_model,
    save_model,
)
from nanogpt_surgery.files.atomic import file_hash
from nanogpt_surgery.formats.folders.run_folder import (
    best_checkpoint,
    checkpoints,
    latest_checkpoint,
)
from nanogpt_surgery.formats.model_file import write_model_files
from nanogpt_surgery.runs.checkpoints import RunFolder, open_run_folder, training_state
from nanogpt_surgery.training.optimizer import make_optimizer

TEXT = "the quick brown fox jumps over the lazy dog. " * 20
SETTINGS = FitSettings(
    max_steps=6, batch_size=3, evaluate_every=2, warmup_steps=1, compile="off", device="cpu"
)
DESCRIPTION = {"kind": "test", "settings": SETTINGS.to_dict()}


def parts(dropout: float = 0.1) -> tuple[SimpleGPT, GPTDataset, CharacterTokenizer]:
    torch.manual_seed(0)
    tokenizer = CharacterTokenizer(TEXT)
    model = SimpleGPT(tokenizer.vocab_size, 24, 3, 2, 10, dropout=dropout)
    return model, GPTDataset(TEXT, tokenizer, 7), tokenizer


def train(folder: Path, *, resume: bool = False, stop_after: int = 99) -> SimpleGPT:
    model, dataset, tokenizer = parts()
    with open_run_folder(folder, DESCRIPTION, resume) as run:
        optimizer = make_optimizer(model, SETTINGS)
        if run.checkpoint:
            run.restore(model, optimizer)
        steps = fit(
            model,
            dataset,
            SETTINGS,
            validation=dataset,
            optimizer=optimizer,
            first_step=run.first_step,
        )
        for step in steps:
            run.record(step)
            if step.validation_loss is not None:
                run.save(step, lambda f: write_model_files(model, f, tokenizer), model, optimizer)
            if step.step == stop_after:
                break
    return model


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def test_resuming_in_the_middle_is_golden(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    train(tmp_path / "cut", stop_after=3)  # one step beyond the checkpoint of step 2
    assert [step for step, _ in losses(tmp_path / "cut")] == [1, 2, 3]
    train(tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name in ("model.safetensors", "training.safetensors"):
        a, b = (tmp_path / run / "checkpoints" / "step-00000006" / name for run in ("whole", "cut"))
        assert file_hash(a) == file_hash(b)


def test_a_resume_without_the_optimizer_is_not_golden(tmp_path: Path) -> None:
    """The test above can fail: the optimizer's state matters."""
    whole, cut = train(tmp_path / "whole"), tmp_path / "cut"
    train(cut, stop_after=3)
    model, dataset, _ = parts()
    model.load_state_dict(open_model(latest_checkpoint(cut) or cut)[0].state_dict())
    list(fit(model, dataset, SETTINGS, first_step=2))
    assert not torch.equal(model.lm_head.weight, whole.lm_head.weight)


def test_resuming_a_finished_run_does_nothing(tmp_path: Path) -> None:
    train(tmp_path / "run")
    before = losses(tmp_path / "run")
    train(tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == before


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", stop_after=2)
    with pytest.raises(SurgeryError, match="resume=True"):
        train(tmp_path / "run")


def test_a_changed_setting_is_refused_with_the_difference(tmp_path: Path) -> None:
    train(tmp_path / "run", stop_after=2)
    changed = DESCRIPTION | {"settings": SETTINGS.to_dict() | {"seed": 2}}
    with (
        pytest.raises(SurgeryError, match=r"seed was 1337 and is 2"),
        open_run_folder(tmp_path / "run", changed, resume=True),
    ):
        pass


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear diary")
    with pytest.raises(SurgeryError, match=re.escape(str(tmp_path))):
        train(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    model, dataset, tokenizer = parts()
    optimizer = make_optimizer(model, SETTINGS)
    with open_run_folder(tmp_path / "run", DESCRIPTION, resume=False) as run:
        step = next(fit(model, dataset, SETTINGS, optimizer=optimizer))
        for number, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]:
            done = type(step)(**step.to_dict() | {"step": number, "validation_loss": loss})
            run.save(done, lambda f: write_model_files(model, f, tokenizer), model, optimizer)
    kept = [folder.name for folder in checkpoints(tmp_path / "run")]
    assert kept == ["step-00000002", "step-00000004", "step-00000005"]
    best = best_checkpoint(tmp_path / "run")
    assert best and best.name == "step-00000002"
    shown = tmp_path / "run" / "model.safetensors"
    assert file_hash(shown) == file_hash(best / "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, how: str) -> None:
    train(tmp_path / "run", stop_after=4)
    newest = checkpoints(tmp_path / "run")[-1]
    assert newest.name == "step-00000004"
    spoil(newest / name, how)
    with pytest.warns(SurgeryWarning, match=name):
        found = latest_checkpoint(tmp_path / "run")
    assert found and found.name == "step-00000002"


def spoil(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "remove":
        file.unlink()
        return
    if how == "flip":
        data[len(data) // 2] ^= 1
    file.unlink()  # the top of the run folder links to the same bytes
    file.write_bytes(data if how == "flip" else data[:-1])


def test_stray_folders_are_neither_chosen_nor_deleted(tmp_path: Path) -> None:
    train(tmp_path / "run", stop_after=4)
    stray = tmp_path / "run" / "checkpoints" / "step-999"
    stray.mkdir()
    (tmp_path / "run" / "checkpoints" / "step-00000999").mkdir()  # no manifest
    train(tmp_path / "run", resume=True)
    assert stray.is_dir()
    latest = latest_checkpoint(tmp_path / "run")
    assert latest and latest.name == "step-00000006"


def test_a_run_folder_can_be_moved_and_copied(tmp_path: Path) -> None:
    train(tmp_path / "run", stop_after=2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "run").rename(tmp_path / "moved")
    for place in ("copy", "moved"):
        train(tmp_path / place, resume=True)
    assert losses(tmp_path / "copy") == losses(tmp_path / "moved")


def test_a_torn_last_line_of_metrics_is_tolerated(tmp_path: Path) -> None:
    train(tmp_path / "run", stop_after=4)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(tmp_path / "run", resume=True)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    train(tmp_path / "run", stop_after=2)
    model, dataset, _ = parts()
    optimizer = make_optimizer(model, SETTINGS)
    step = next(fit(model, dataset, SETTINGS, optimizer=optimizer))

    def full_disk(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    run = RunFolder(tmp_path / "run")
    with pytest.raises(SurgeryError, match="No space left on device"):
        run.save(step, full_disk, model, optimizer)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "step-00000002"
    ]


def test_a_run_killed_at_its_start_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / ".tmp-step-00000002-0123abcd").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "run" / ".tmp-run.json-0123abcd")
    (tmp_path / "run" / "LOCK").write_text("1")
    train(tmp_path / "run", stop_after=2)
    assert not list((tmp_path / "run").rglob(".tmp-*"))


def test_a_torn_manifest_is_passed_over(tmp_path: Path) -> None:
    train(tmp_path / "run", stop_after=4)
    manifest = checkpoints(tmp_path / "run")[-1] / "MANIFEST.json"
    manifest.write_text(manifest.read_text()[:50])
    with pytest.warns(SurgeryWarning, match=r"MANIFEST\.json cannot be read"):
        found = latest_checkpoint(tmp_path / "run")
    assert found and found.name == "step-00000002"


def test_the_training_state_is_named_by_parameter() -> None:
    model, dataset, _ = parts()
    optimizer = make_optimizer(model, SETTINGS)
    next(fit(model, dataset, SETTINGS, optimizer=optimizer))
    names = {name.partition(":")[0] for name in training_state(model, optimizer)}
    assert names == {name for name, _ in model.named_parameters()}


def test_lost_metrics_are_said_before_anything_is_done(tmp_path):
    train(tmp_path / "run", stop_after=2)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SurgeryError, match=r"metrics\.jsonl is gone"):
        train(tmp_path / "run", resume=True)
    assert sorted(tmp_path.rglob("*")) == before


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def stands(run: Path) -> tuple[str, str, str]:
    """The newest checkpoint, the best one, and the one whose weights the top of a run shows."""
    top = file_hash(run / "model.safetensors")
    shown = [c.name for c in checkpoints(run) if file_hash(c / "model.safetensors") == top]
    latest, best = ((run / hint).read_text().strip() for hint in ("LATEST", "BEST"))
    return latest, best, shown[0] if shown else "none"


def validation_losses(run: Path) -> dict[str, float]:
    return {
        folder.name: json.loads((folder / "training.json").read_text())["validation_loss"]
        for folder in checkpoints(run)
    }


def assert_says_what_is(run: Path) -> None:
    """The hints and the top of a run say what its checkpoints say."""
    known = validation_losses(run)
    best = min(known, key=lambda name: known[name])
    assert stands(run) == (max(known), best, best)
    assert not list(run.rglob(".tmp-*"))


def test_a_run_leaves_no_temporary_names(tmp_path: Path) -> None:
    model, dataset, tokenizer = parts()
    optimizer = make_optimizer(model, SETTINGS)
    with open_run_folder(tmp_path / "run", DESCRIPTION, resume=False) as run:
        step = next(fit(model, dataset, SETTINGS, optimizer=optimizer))
        for number, loss in [(1, 1.0), (2, 3.0), (3, 2.0)]:  # no improvement after the first
            done = type(step)(**step.to_dict() | {"step": number, "validation_loss": loss})
            run.save(done, lambda f: write_model_files(model, f, tokenizer), model, optimizer)
    assert not [name for name in names(tmp_path) if ".tmp-" in name]
    assert stands(tmp_path / "run") == ("step-00000003", "step-00000001", "step-00000001")


def spoil_hints(run: Path) -> None:
    """The state that a kill leaves after a checkpoint's rename, and worse."""
    (run / "LATEST").write_text("step-00000002\n")
    (run / "BEST").write_bytes(b"\xff\x00 nonsense")
    (run / "config.json").unlink()
    (run / "model.safetensors").unlink()
    (run / "model.safetensors").write_bytes(b"of an older checkpoint")


@pytest.mark.parametrize("stop", [4, 6])
def test_hints_and_the_top_are_derived_again_at_every_start(tmp_path: Path, stop: int) -> None:
    run = tmp_path / "run"
    train(run, stop_after=stop)
    spoil_hints(run)
    with open_run_folder(run, DESCRIPTION, resume=True) as going:
        assert going.best and going.best_loss == min(validation_losses(run).values())
    assert_says_what_is(run)


def test_the_best_is_kept_though_a_kill_came_before_best_said_so(tmp_path: Path) -> None:
    """Its rename was the last thing done; later checkpoints are worse, and prune."""
    model, dataset, tokenizer = parts()
    optimizer, run = make_optimizer(model, SETTINGS), tmp_path / "run"
    first = next(fit(model, dataset, SETTINGS, optimizer=optimizer))

    def save(going: RunFolder, number: int, loss: float | None) -> None:
        done = type(first)(**first.to_dict() | {"step": number, "validation_loss": loss})
        going.record(done)
        going.save(done, lambda f: write_model_files(model, f, tokenizer), model, optimizer)

    with open_run_folder(run, DESCRIPTION, resume=False) as going:
        save(going, 1, 3.0)
        save(going, 2, 1.0)
    (run / "BEST").write_text("step-00000001\n")
    (run / "LATEST").write_text("step-00000001\n")
    with open_run_folder(run, DESCRIPTION, resume=True) as going:
        for number, loss in [(3, 2.0), (4, None), (5, None)]:
            save(going, number, loss)
    assert [*validation_losses(run)] == ["step-00000002", "step-00000004", "step-00000005"]
    assert stands(run)[:2] == ("step-00000005", "step-00000002")


def test_a_damaged_best_is_said_and_the_next_best_takes_its_place(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run)
    known = validation_losses(run)
    best, second = sorted(known, key=lambda name: known[name])[:2]
    for name, how in [("training.json", "cut"), ("MANIFEST.json", "remove")]:
        shutil.copytree(run, tmp_path / how)
        spoil(tmp_path / how / "checkpoints" / best / name, how)
        with pytest.warns(SurgeryWarning, match=rf"{best}.*{name}"):
            found = best_checkpoint(tmp_path / how)
        assert found and found.name == second


@pytest.mark.parametrize("what", ["a folder", "a file", "a dangling link", "a lost manifest"])
def test_what_stands_where_a_step_will_come_is_stepped_around(tmp_path: Path, what: str) -> None:
    run, place = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000006"
    train(run, stop_after=6 if what == "a lost manifest" else 4)
    stray = run / "checkpoints" / "step-000999"
    stray.mkdir()
    if what == "a folder":
        place.mkdir()
        (place / "letter.txt").write_text("dear diary")
    elif what == "a file":
        place.write_text("dear diary")
    elif what == "a dangling link":
        place.symlink_to("nowhere")
    else:
        (place / "MANIFEST.json").unlink()
    before = names(place) if place.is_dir() else []
    with pytest.warns(SurgeryWarning, match="step-00000006"):
        train(run, resume=True)
    assert stray.is_dir()
    assert place.is_symlink() or place.exists()
    assert (names(place) if place.is_dir() else []) == before
    latest = latest_checkpoint_quietly(run)
    assert latest and latest.name == "step-00000006-2"
    train(tmp_path / "whole")
    wanted = tmp_path / "whole" / "checkpoints" / "step-00000006" / "training.safetensors"
    assert file_hash(latest / "training.safetensors") == file_hash(wanted)


def latest_checkpoint_quietly(run: Path) -> Path | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)
        return latest_checkpoint(run)


def test_a_model_folder_under_a_checkpoints_name_is_not_gone_on_from(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, stop_after=4)
    save_model(parts()[0], run / "checkpoints" / "step-00000999")
    train(run, resume=True)
    assert (run / "LATEST").read_text() == "step-00000006\n"
    assert (run / "checkpoints" / "step-00000999").is_dir()


def test_strict_stops_at_a_damaged_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, stop_after=4)
    spoil(checkpoints(run)[-1] / "model.safetensors", "flip")
    before = names(run)
    with (
        pytest.raises(SurgeryError, match=r"step-00000004.*model\.safetensors"),
        open_run_folder(run, DESCRIPTION, resume=True, strict=True),
    ):
        raise AssertionError("never begun")
    assert names(run) == before


def test_allowed_changes_are_said_and_written_down(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, stop_after=2)
    changed = DESCRIPTION | {"settings": SETTINGS.to_dict() | {"seed": 2}}
    model, _, _ = parts()
    with (
        pytest.warns(SurgeryWarning, match="seed was 1337 and is 2"),
        open_run_folder(run, changed, resume=True, allow_changes=True) as going,
    ):
        assert json.loads((run / "run.json").read_text()) == DESCRIPTION  # until it fits
        going.restore(model, make_optimizer(model, SETTINGS))
    described = json.loads((run / "run.json").read_text())
    assert described["settings"]["seed"] == 2
    assert described["changes"] == [{"after_step": 2, "what": ["seed was 1337 and is 2"]}]
    with open_run_folder(run, changed, resume=True):
        pass


def test_another_model_is_refused_though_changes_are_allowed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, stop_after=2)
    before = (run / "run.json").read_text()
    changed = DESCRIPTION | {"settings": SETTINGS.to_dict() | {"seed": 2}}
    wider = SimpleGPT(parts()[2].vocab_size, 36, 3, 2, 10)
    with (
        pytest.warns(SurgeryWarning),
        open_run_folder(run, changed, resume=True, allow_changes=True) as going,
        pytest.raises(SurgeryError, match=r"24.* there and .*36"),
    ):
        going.restore(wider, make_optimizer(wider, SETTINGS))
    assert (run / "run.json").read_text() == before


def test_a_checkpoint_without_a_validation_loss_is_not_the_best(tmp_path: Path) -> None:
    model, dataset, tokenizer = parts()
    optimizer = make_optimizer(model, SETTINGS)
    with open_run_folder(tmp_path / "run", DESCRIPTION, resume=False) as run:
        step = next(fit(model, dataset, SETTINGS, optimizer=optimizer))
        run.record(step)
        run.save(step, lambda f: write_model_files(model, f, tokenizer), model, optimizer)
    assert best_checkpoint(tmp_path / "run") is None
    with open_run_folder(tmp_path / "run", DESCRIPTION, resume=True) as run:
        assert run.first_step == 1


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_a_checkpoint_is_begun_anew(tmp_path: Path, resume: bool) -> None:
    run = tmp_path / "run"
    train(run, stop_after=1)
    corrected = DESCRIPTION | {"settings": SETTINGS.to_dict() | {"seed": 2}}
    with open_run_folder(run, corrected, resume=resume):
        assert json.loads((run / "run.json").read_text()) == corrected
        assert not (run / "metrics.jsonl").exists()


def test_a_run_without_a_checkpoint_that_holds_more_is_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, stop_after=1)
    (run / "letter.txt").write_text("dear diary")
    before = names(run)
    with (
        pytest.raises(SurgeryError, match="resume=True"),
        open_run_folder(run, DESCRIPTION, resume=False),
    ):
        raise AssertionError("never begun")
    assert names(run) == before


@pytest.mark.parametrize(("failures", "saved"), [(1, True), (2, True), (99, False)])
@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
def test_a_device_that_fails_is_asked_again_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, failures: int, saved: bool
) -> None:
    run, failed = tmp_path / "run", []
    train(run, stop_after=2)
    owner = os if call == "fsync" else Path
    works = getattr(owner, call)

    def failing(*arguments: object) -> object:
        if len(failed) < failures:
            failed.append(call)
            raise OSError(errno.EIO, "Input/output error")
        return works(*arguments)

    monkeypatch.setattr("nanogpt_surgery.files.disk_errors._PAUSE", 0)
    model, dataset, tokenizer = parts()
    optimizer = make_optimizer(model, SETTINGS)
    with open_run_folder(run, DESCRIPTION, resume=True) as going:
        going.restore(model, optimizer)
        step = next(fit(model, dataset, SETTINGS, optimizer=optimizer, first_step=2))
        going.record(step)
        monkeypatch.setattr(owner, call, failing)
        save = partial(
            going.save, step, lambda f: write_model_files(model, f, tokenizer), model, optimizer
        )
        if saved:
            save()
        else:
            with pytest.raises(SurgeryError, match=rf"{tmp_path}.*Input/output error"):
                save()
            assert 3 <= len(failed) < 30
        monkeypatch.undo()
    newest = latest_checkpoint(run)
    assert newest and newest.name == ("step-00000003" if saved else "step-00000002")
    assert not list(run.rglob(".tmp-*"))


def test_killed_at_any_call_a_run_says_what_its_checkpoints_say(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "helpers.killed_saves", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(kills > 8 for kills in json.loads(done.stdout).values()), done.stdout
