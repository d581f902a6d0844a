"""Run, adapter and model folders that earlier versions made still open, resume and are undone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.commands import called

from nanogpt_surgery import load_adapter, open_model, remove_lora

KEPT = Path(__file__).parents[1] / "kept"
VERSIONS = sorted(path.name for path in KEPT.iterdir() if path.is_dir())
COMMON = "--batch-size 4 --max-steps 8 --seed 3 --device cpu --precision float32 --compile off"
TRAIN = (
    "--n-embd 8 --n-head 2 --n-layer 1 --block-size 8 --n-inner 8 "
    "--n-prev-tokens 2 --evaluate-every 2"
).split()
TUNE = (
    "--targets q_proj lm_head --rank 2 --dropout 0.1 --cache-gib 0.5 --evaluate-every 3 "
    "--warmup-steps 2 --learning-rate 0.02"
).split()


@pytest.fixture(params=VERSIONS)
def kept(request, tmp_path) -> Path:
    """The folders of a version, in a copy of our own."""
    shutil.copy(KEPT / "text.txt", tmp_path)
    return Path(shutil.copytree(KEPT / request.param, tmp_path / request.param))


@pytest.fixture
def expected(kept) -> dict:
    return json.loads((kept / "expected.json").read_text())


def logits(model: torch.nn.Module, expected: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([expected["ids"]]))[0]


def assert_as(model: torch.nn.Module, name: str, expected: dict) -> None:
    torch.testing.assert_close(
        logits(model, expected), torch.tensor(expected[name]), rtol=1e-4, atol=5e-5
    )


def test_there_are_versions_to_look_at():
    assert VERSIONS == ["0aeee3e", "806b6a1"]


def test_a_run_opens_as_a_model_with_its_tokenizer(kept, expected):
    model, tokenizer = open_model(kept / "trained")
    assert_as(model, "trained", expected)
    assert tokenizer.decode(tokenizer.encode("a tin man")) == "a tin man"


@pytest.mark.parametrize("name", ["tuned", "adapter", "pissa"])
def test_an_adapter_loads_onto_its_base_and_comes_off_again(kept, expected, name):
    model, _ = open_model(kept / "trained")
    load_adapter(model, kept / name)
    assert_as(model, name, expected)
    remove_lora(model)
    assert_as(model, "trained", expected)


def goes_on(run: Path, metrics: list[dict], last: int, *words: object) -> None:
    """Resume a run that was killed after its checkpoint of step `last`."""
    said = called(*words, "--out", run, "--resume", *COMMON.split())[1]
    assert f"going on from step {last} of 8" in said
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["step"]]
    assert [row["step"] for row in found] == list(range(1, 9))
    for row, wanted in zip(found, metrics, strict=True):
        known = {key: value for key, value in wanted.items() if value is not None}
        assert {key: row[key] for key in known} == pytest.approx(known, rel=1e-4)
        assert all(row[key] is None for key in wanted.keys() - known.keys())


def test_a_training_goes_on_to_the_numbers_it_would_have_had(kept, expected):
    run = kept / "trained"
    goes_on(run, expected["trained_metrics"], 2, "train", kept.parent / "text.txt", *TRAIN)


def test_a_fine_tuning_goes_on_to_the_numbers_it_would_have_had(kept, expected):
    words = ["finetune", kept / "trained", kept.parent / "text.txt", *TUNE]
    goes_on(kept / "tuned", expected["tuned_metrics"], 3, *words)


def test_a_merge_is_undone_and_done_again(kept, expected):
    folder = kept / "merged"
    assert_as(open_model(folder)[0], "merged", expected)
    called("undo", folder)
    assert_as(open_model(folder)[0], "trained", expected)
    called("redo", folder)
    assert_as(open_model(folder)[0], "merged", expected)


def test_what_an_operation_did_is_listed(kept):
    assert "merge" in called("log", kept / "merged")[0]
