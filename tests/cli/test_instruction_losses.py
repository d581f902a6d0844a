"""Instruction data from preview to evaluation: the commands agree on numbers and on templates."""

import json
from pathlib import Path

import pytest
from helpers.commands import called, write_model

PAIRS = [(a, b) for a in range(5) for b in range(4)]
HELD_OUT = len(PAIRS) // 10


@pytest.mark.parametrize("template", ["model", "chatml"])
def test_eval_finds_the_loss_that_training_measured(tmp_path: Path, template: str) -> None:
    write_model(tmp_path / "m")
    records = [{"prompt": f"{a} and {b}?", "completion": str(a + b) * (a + 1)} for a, b in PAIRS]
    (tmp_path / "all.json").write_text(json.dumps(records))
    (tmp_path / "held.json").write_text(json.dumps(records[-HELD_OUT:]))
    model, data, adapter = (tmp_path / name for name in ("m", "all.json", "a"))
    flags = [] if template == "model" else ["--template", template]
    _, said = called("data", "preview", model, data, *flags)
    assert " ".join(["finetune", str(model), str(data), *flags, "--out"]) in said
    steps = ["--max-steps", 2, "--learning-rate", 0.05]
    _, said = called("finetune", model, data, "--out", adapter, *steps, *flags)
    assert f"surgery chat {model} --adapter {adapter} talks" in said
    lines = (adapter / "metrics.jsonl").read_text().splitlines()
    rows = {row["step"]: row["validation_loss"] for row in map(json.loads, lines)}
    base, _ = called("eval", model, tmp_path / "held.json", *flags, "--json")
    tuned, _ = called("eval", model, tmp_path / "held.json", "--adapter", adapter, "--json")
    assert json.loads(base)["loss"] == pytest.approx(rows[0], rel=1e-5)
    assert json.loads(tuned)["loss"] == pytest.approx(rows[2], rel=1e-5)
    assert rows[2] != pytest.approx(rows[0], rel=1e-3)
