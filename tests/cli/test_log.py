"""`surgery log` on a terminal of 80 columns."""

import json
from pathlib import Path

import pytest
from helpers.commands import called, write_adapter

from nanogpt_surgery import open_model

SMALL = "--n-embd 16 --n-head 2 --n-layer 1 --block-size 8 --batch-size 2 --max-steps 1".split()


def test_the_log_of_a_run_is_readable_and_whole_at_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    long = "an adapter whose name is long/and lies deep in folders/so that no line holds it all"
    Path("text.txt").write_text("to be, or not to be\n" * 30)
    called("train", "text.txt", "--out", "run", *SMALL)
    write_adapter(open_model("run")[0], Path("second"), 1)
    write_adapter(open_model("run")[0], Path(long), 2)
    called("merge", "run", long)
    called("undo", "run")
    called("merge", "run", "second")
    out, _ = called("log", "run")
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    rows = json.loads(called("log", "run", "--json")[0])["rows"]
    assert [row["state"] for row in rows] == [
        "done, cannot be undone", "undone, cannot be redone", "done",
    ]  # fmt: skip
    for row in rows:
        assert f"{row['']} {row['when']} {row['operation']}: {row['state']}" in words
        for file in (*row["files"].split(", "), row["on base"]):
            assert file in words
        shown = {"kl": "KL divergence", "validation loss": "validation loss"}
        for name, label in shown.items():
            assert row[name] is None or f"{label}: {row[name]:.4g}" in words
    assert "can undo: merge second" in out
