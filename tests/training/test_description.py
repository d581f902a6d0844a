"""What an older description is taken to say, and the flags that bring it back."""

from dataclasses import replace

import pytest

from nanogpt_surgery import FitSettings
from nanogpt_surgery.training.description import differences, flags_to_resume
from nanogpt_surgery.training.recipes import MUON

ADAMW, NOW = FitSettings(), FitSettings(**MUON)


def described(settings: FitSettings, *unknown: str) -> dict:
    """A description by a version that did not know some settings yet."""
    values = settings.to_dict()
    return {"settings": {name: v for name, v in values.items() if name not in unknown}}


def test_before_evaluations_read_a_part_they_read_all():
    old, now = described(NOW, "evaluate_tokens"), described(NOW)
    assert differences(old, now) == ["settings.evaluate_tokens was 0 and is now 262144"]
    assert flags_to_resume(old, now) == "--evaluate-tokens 0"
    assert differences(old, described(replace(NOW, evaluate_tokens=0))) == []


@pytest.mark.parametrize(
    ("old", "now", "flags"),
    [
        (ADAMW, NOW, "--no-muon"),
        (replace(ADAMW, clip=0.5), NOW, "--no-muon --clip 0.5"),
        (replace(NOW, seed=3), NOW, "--seed 3"),
        (NOW, NOW, ""),
    ],
)
def test_the_flags_bring_back_what_was(old, now, flags):
    assert flags_to_resume(described(old), described(now)) == flags


def test_a_run_by_muon_is_told_its_values():
    flags = flags_to_resume(described(NOW), described(ADAMW)).split(" --")
    assert flags[0] == "--muon"
    assert "learning-rate 0.03" in flags
    assert "clip 0.0" in flags
