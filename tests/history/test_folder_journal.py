"""The journal of a folder: what it refuses, and what does not split it."""

import json

import pytest
from helpers.merged_folders import model_and_adapter

from nanogpt_surgery import (
    SurgeryError,
)
from nanogpt_surgery.formats.folders.merging import merge_adapter
from nanogpt_surgery.history.folder_history import (
    folder_log,
    read_journal,
    redo_folder,
    undo_folder,
)


@pytest.fixture
def place(tmp_path):
    return model_and_adapter(tmp_path)


def test_a_share_under_its_older_name_is_shown(place):
    merge_adapter(place / "model", place / "adapter")
    journal = next(place.rglob("journal.jsonl"))
    text = journal.read_text()
    assert "top_token_unchanged" in text
    shown = folder_log(place / "model").rows[0]["top token unchanged"]
    journal.write_text(text.replace("top_token_unchanged", "same_greedy"))
    assert folder_log(place / "model").rows[0]["top token unchanged"] == shown is not None


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"event": "done"}',
        '{"event": "undone", "number": 1}',
        json.dumps(
            {
                **dict.fromkeys(("operation", "base", "originals", "when"), ""),
                "event": "done",
                "number": 1,
                "planned": {},
                "measured": {},
                "before": {},
                "after": {"../thesis": "0" * 64},
            }
        ),
    ],
)
def test_a_journal_that_cannot_be_read_is_named_with_its_line(place, line):
    model = place / "model"
    merge_adapter(model, place / "adapter")
    undo_folder(model)
    with (model / "operations" / "journal.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SurgeryError, match=r"journal\.jsonl, line 3"):
        redo_folder(model)


def test_a_journal_is_split_at_line_ends_alone_and_one_in_latin_1_is_refused(place):
    adapter = place / "a\u2028b\x85c"
    (place / "adapter").rename(adapter)
    merge_adapter(place / "model", adapter)
    assert str(adapter) in folder_log(place / "model").rows[-1]["operation"]
    journal = place / "model" / "operations" / "journal.jsonl"
    journal.write_bytes("é".encode("latin-1") + journal.read_bytes())
    with pytest.raises(SurgeryError, match=r"journal\.jsonl is not UTF-8 at byte 0"):
        read_journal(place / "model")
