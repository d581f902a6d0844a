"""Steps that are not finite, and early stopping, where two processes share every batch.

torchrun runs this file, too: it is what each of the two processes does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import LETTERS, write_model
from test_nonfinite import DATASET, SETTINGS, Z, model_of

from nanogpt_surgery import fit, inject_lora, open_model, save_model, tensor_hashes
from nanogpt_surgery.errors import NotFiniteError
from nanogpt_surgery.training.distributed import joined

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TESTS = str(Path(__file__).parents[1])
BATCH, STEPS = 4, 30
WAYS = {"all": None, "lora": ["q_proj", "v_proj"], "head": ["lm_head"]}


def run_in_two(*words: object) -> subprocess.CompletedProcess:
    path = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*TORCHRUN, *map(str, words)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


def main(folder: Path) -> None:
    """Train in every way, then with what never is finite; write what this process saw."""
    found = {}
    with joined() as world:
        for way, targets in WAYS.items():
            model = model_of(0.1)
            if targets:
                inject_lora(model, targets, rank=2)
            steps = fit(model, DATASET, SETTINGS, batch_size=BATCH, max_steps=STEPS)
            found[way] = [step.skipped for step in steps], tensor_hashes(model)
        found["own"] = [holds_z(step, **world.share) for step in range(STEPS)]
        found["end"] = steps_until_the_end()
        (folder / f"{world.rank}.json").write_text(json.dumps(found))


def holds_z(step: int, **share: int) -> bool:
    return bool((DATASET.batch(step, BATCH, SETTINGS.seed, **share)[0] == Z).any())


def steps_until_the_end() -> int:
    model, done = model_of(), []
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight.fill_(3e38)
    try:
        done.extend(fit(model, DATASET, SETTINGS, batch_size=BATCH, max_skipped_steps=3))
    except NotFiniteError:
        return len(done)
    return -1


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("skipping")
    done = run_in_two(__file__, folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("way", WAYS)
def test_both_skip_the_steps_that_are_not_finite_in_one_of_them(seen, way):
    bad = [holds_z(step) for step in range(STEPS)]
    own = [process["own"] for process in seen]
    assert any(a != b for a, b in zip(*own, strict=True))  # one of them alone saw it
    assert [a or b for a, b in zip(*own, strict=True)] == bad
    (skipped, weights), (other_skipped, other_weights) = (process[way] for process in seen)
    assert skipped == other_skipped == bad
    assert weights == other_weights


def test_both_end_after_as_many_in_a_row(seen):
    assert [process["end"] for process in seen] == [2, 2]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text with a letter that overflows in `far`, the model beside it; none is held out."""
    write_model(tmp_path / "m")
    model, tokenizer = open_model(tmp_path / "m")
    with torch.no_grad():
        model.embed_tokens.weight[tokenizer.encode("~")[0]] = 3e38
    save_model(model, tmp_path / "far", tokenizer)
    line = "to be, or not to be: that is the question.\n"
    (tmp_path / "text.txt").write_text((line * 2 + "~") * 18 + line * 5)
    assert "~" in LETTERS
    return tmp_path / "text.txt"


def test_both_stop_early_at_the_same_step_and_count_what_was_skipped(text, tmp_path):
    flags = "--learning-rate 0.3 --no-muon --warmup-steps 0 --schedule stable --cooldown 0 "
    flags += "--max-steps 60 --evaluate-every 2 --patience 2 --sample-every 0 --batch-size 4 "
    flags += "--block-size 12 --precision float32 --max-skipped-steps 9 --json"
    words = [
        "train",
        text,
        "--init-from",
        tmp_path / "far",
        "--out",
        tmp_path / "run",
        *flags.split(),
    ]
    done = run_in_two("-m", "nanogpt_surgery", *words)
    assert done.returncode == 0, done.stderr  # else one would have waited for the other in vain
    summary = json.loads(done.stdout)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]  # after step 0
    losses = {row["step"]: row["validation_loss"] for row in rows if row["validation_loss"]}
    best = min(losses, key=losses.get)
    assert summary["steps"] == len(rows) == best + 4 < 60
    assert {row["processes"] for row in rows} == {2}
    assert summary["skipped_steps"] == sum(row["skipped"] for row in rows) > 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
