"""Run folders under operations: merged into, undone, and trained on again."""

import json
import shutil

import pytest
import torch
from helpers.models import train_a_little
from helpers.training import DATASET, SETTINGS, TOKENIZER, VALIDATION, model_of

from nanogpt_surgery import (
    FitSettings,
    GPTConfig,
    SurgeryError,
    fit,
    inject_lora,
    open_model,
    save_adapter,
)
from nanogpt_surgery.files.atomic import file_hash
from nanogpt_surgery.formats.folders.merging import merge_adapter
from nanogpt_surgery.formats.folders.operating import operate_on_folder
from nanogpt_surgery.formats.folders.run_folder import checkpoint_folder
from nanogpt_surgery.formats.model_file import write_model_files
from nanogpt_surgery.history.folder_history import folder_log, hashes_of, undo_folder
from nanogpt_surgery.runs.checkpoints import RunFolder, open_run_folder
from nanogpt_surgery.surgery import prune_layers
from nanogpt_surgery.training.optimizer import make_optimizer

DESCRIPTION = {
    "kind": "train",
    "model": model_of().config.to_dict(),
    "settings": SETTINGS.to_dict(),
}
SHOWN = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def train(folder, steps):
    """Begin a run or go on with it, for so many steps, each with a checkpoint."""
    model = model_of()
    optimizer = make_optimizer(model, SETTINGS)
    with open_run_folder(folder, DESCRIPTION, resume=True) as run:
        if run.checkpoint:
            run.restore(model, optimizer)
        first = run.first_step
        going = fit(
            model, DATASET, SETTINGS, evaluate_every=1, validation=VALIDATION,
            optimizer=optimizer, first_step=first,
        )  # fmt: skip
        for step in going:
            run.record(step)
            run.save(step, lambda to: write_model_files(model, to, TOKENIZER), model, optimizer)
            if step.step == first + steps:
                break


@pytest.fixture
def place(tmp_path):
    """A run that was stopped after two steps, and an adapter for it."""
    train(tmp_path / "run", 2)
    make_adapter(tmp_path / "run", tmp_path / "adapter")
    return tmp_path


def make_adapter(folder, goal):
    model, _ = open_model(folder)
    inject_lora(model, ["q_proj", "lm_head"], rank=2)
    train_a_little(model, size=0.2)
    save_adapter(model, goal)


def test_a_run_that_went_on_after_an_undo_is_merged_into_again(place):
    run = place / "run"
    merge_adapter(run, place / "adapter")
    undo_folder(run)
    train(run, 2)  # and was stopped again: nothing is written down at an end
    make_adapter(run, place / "second")
    merge_adapter(run, place / "second")
    rows = folder_log(run).rows
    assert [row["operation"].split()[0] for row in rows] == ["merge", "training", "merge"]
    assert [row["state"] for row in rows] == [
        "undone, cannot be redone",
        "done, cannot be undone",
        "done",
    ]
    undo_folder(run)
    with pytest.raises(SurgeryError, match="'training went on'"):
        undo_folder(run)


def test_what_is_trained_on_after_other_hands_is_still_theirs(place):
    """A line is written only where a checkpoint is about to be shown."""
    run = place / "run"
    merge_adapter(run, place / "adapter")
    undo_folder(run)
    with open_run_folder(run, DESCRIPTION, resume=True):
        pass  # killed before the first checkpoint
    assert len(folder_log(run).rows) == 1


@pytest.mark.parametrize("missing", [SHOWN, SHOWN[2:], SHOWN[:1]])
def test_a_run_whose_checkpoint_was_never_shown_is_merged_into_whole(place, missing):
    run = place / "run"
    for name in missing:
        (run / name).unlink()
    merge_adapter(run, place / "adapter")
    model, tokenizer = open_model(run)
    wanted, _ = open_model(checkpoint_folder(run, 2))
    assert not torch.equal(model.lm_head.weight, wanted.lm_head.weight)
    assert tokenizer.decode(tokenizer.encode("how much")) == "how much"
    config = checkpoint_folder(run, 2) / "config.json"
    assert json.loads((run / "config.json").read_text()) == json.loads(config.read_text())
    undo_folder(run)
    assert not any((run / name).exists() for name in missing)
    assert torch.equal(open_model(run)[0].lm_head.weight, wanted.lm_head.weight)


def test_files_that_a_run_shows_already_stay_the_same(place):
    run = place / "run"
    before = {name: (run / name).stat().st_ino for name in SHOWN}
    merge_adapter(run, place / "adapter")
    after = {name: (run / name).stat().st_ino for name in SHOWN}
    assert [name for name in SHOWN if before[name] != after[name]] == ["model.safetensors"]


def test_tensors_that_are_not_the_models_stay(place):
    """Shards go with their index; what no index names is somebody's own."""
    checkpoint, folder = checkpoint_folder(place / "run", 2), place / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "MANIFEST.json").unlink()
    shutil.copyfile(place / "adapter" / "adapter_model.safetensors", folder / "style.safetensors")
    before = file_hash(folder / "style.safetensors")
    for keep in (True, False):
        merge_adapter(folder, place / "adapter", keep_originals=keep, force=True)
        assert file_hash(folder / "style.safetensors") == before
        if keep:
            undo_folder(folder)


def test_a_run_begun_before_a_setting_existed_goes_on(place):
    path = place / "run" / "run.json"
    old = json.loads(path.read_text())
    for key, name in [("model", "n_prev_tokens"), ("settings", "muon"), ("settings", "cooldown")]:
        del old[key][name]
    path.write_text(json.dumps(old))
    train(place / "run", 1)
    assert RunFolder(place / "run", checkpoint_folder(place / "run", 3)).first_step == 3


def test_what_an_old_run_could_not_have_had_is_still_a_difference(place):
    path = place / "run" / "run.json"
    old = json.loads(path.read_text())
    del old["settings"]["muon"]
    del old["model"]["n_prev_tokens"]
    path.write_text(json.dumps(old))
    changed = {
        "settings": FitSettings(**(SETTINGS.to_dict() | {"muon": True})).to_dict(),
        "model": GPTConfig(**(DESCRIPTION["model"] | {"n_prev_tokens": 2})).to_dict(),
    }
    wanted = "n_prev_tokens was 0 and is 2; muon was False and is True"
    with (
        pytest.raises(SurgeryError, match=wanted),
        open_run_folder(place / "run", DESCRIPTION | changed, resume=True),
    ):
        raise AssertionError("never begun")


@pytest.mark.parametrize(("keep", "way"), [(True, "undo_folder"), (False, "a new folder")])
def test_an_operated_run_says_which_way_is_open(place, keep, way):
    merge_adapter(place / "run", place / "adapter", keep_originals=keep)
    with (
        pytest.raises(SurgeryError, match=way),
        open_run_folder(place / "run", DESCRIPTION, resume=True),
    ):
        raise AssertionError("never begun")


def test_a_run_is_pruned_in_place_and_goes_on_after_an_undo(place):
    run = place / "run"
    before, layers = hashes_of(run), len(open_model(run)[0].layers)

    operate_on_folder(run, lambda model, _, **how: prune_layers(model, [0], **how))
    assert len(open_model(run)[0].layers) == layers - 1
    with pytest.raises(SurgeryError, match="operated on"):
        train(run, 1)
    undo_folder(run)
    assert hashes_of(run) == before
    train(run, 1)
