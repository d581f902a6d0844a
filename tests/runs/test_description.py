"""In what a run differs from the one that its folder holds."""

from dataclasses import replace

import pytest

from nanogpt_surgery import FitSettings, GPTConfig, LoRASettings
from nanogpt_surgery.formats.folders.old_keys import (
    with_current_config,
    with_current_flags,
    with_current_names,
)
from nanogpt_surgery.runs.description import differences
from nanogpt_surgery.training.recipes import MUON

ADAMW, NOW = FitSettings(), FitSettings(**MUON)


def described(settings: FitSettings, *unknown: str, **more: object) -> dict:
    """A description by a version that did not know some settings yet."""
    values = settings.to_dict()
    known = {name: value for name, value in values.items() if name not in unknown}
    return {"kind": "train", "settings": known, **more}


def adapted(rank: int, **more: object) -> dict:
    rows = [{"layer": "layers.0.self_attn.q_proj", "rank": rank}]
    return {
        "kind": "finetune",
        "lora": {"rows": rows, "trainable_parameters": 8 * rank},
        "adapter": LoRASettings(rank=rank).to_dict(),
        "settings": ADAMW.to_dict(),
        "block_size": 64,
        "train_ids": "d78d",
        "base": "b45e",
        **more,
    }


def test_before_evaluations_read_a_part_they_read_all():
    old = described(NOW, "evaluate_tokens")
    assert differences(old, described(NOW)) == ["evaluate_tokens was 0 and is 262144"]
    assert differences(old, described(replace(NOW, evaluate_tokens=0))) == []


def test_a_setting_that_was_not_there_yet_had_its_default():
    assert differences(described(NOW, "max_skipped_steps", "lora_plus_ratio"), described(NOW)) == []
    old = adapted(4)
    del old["adapter"]
    assert differences(old, adapted(4)) == []
    assert differences(adapted(4), adapted(4, stride=1)) == []
    assert differences(adapted(4), adapted(4, stride=64)) == ["stride was 1 and is 64"]


@pytest.mark.parametrize(
    ("old", "now", "names"),
    [
        ({"seed": 3}, {}, ["seed was 3 and is"]),
        ({"max_steps": 60}, {}, ["max_steps was 60 and is 2000"]),
        ({"beta2": 0.9, "batch_size": 3}, {}, ["beta2 was 0.9", "batch_size was 3"]),
        ({}, {"gradient_checkpointing": True}, ["gradient_checkpointing was False and is True"]),
    ],
)
def test_every_setting_that_differs_is_named_with_both_values(old, now, names):
    found = differences(described(replace(ADAMW, **old)), described(replace(ADAMW, **now)))
    assert len(found) == len(names)
    for name in names:
        assert any(line.startswith(name) for line in found)


def test_sizes_of_a_model_are_named():
    old, now = (described(NOW, model=GPTConfig(65, n_embd=n).to_dict()) for n in (64, 128))
    assert any(line.startswith("n_embd was 64 and is 128") for line in differences(old, now))


def test_another_rank_and_another_text_are_a_line_each():
    old, now = adapted(4), adapted(8, train_ids="4129")
    rank = "rank was 4 and is 8"
    assert differences(old, now) == [rank, "the text has changed since"]
    old["named"], now["named"] = {"text": ["a b.txt"]}, {"text": ["books/b.txt"]}
    assert differences(old, now) == [rank, "text was a b.txt and is books/b.txt"]
    now["named"] = {"text": ["./a b.txt"]}
    assert differences(old, now) == [rank, "the text a b.txt has changed since"]


def test_other_rows_of_the_same_text_follow_from_what_cuts_them():
    old, now = adapted(4), adapted(4, train_ids="4129")
    old["named"] = {"text": ["a.jsonl"], "pack": True}
    now["named"] = {"text": ["a.jsonl"], "pack": False}
    assert differences(old, now) == ["pack was True and is False"]
    now |= {"named": old["named"], "block_size": 32}
    assert differences(old, now) == ["block_size was 64 and is 32"]


def test_other_targets_and_another_model_are_named():
    old, now = adapted(4), adapted(4)
    now["lora"] = {"rows": [{"layer": "lm_head", "rank": 4}]}
    assert differences(old, now) == ["other layers learn"]
    old["named"], now["named"] = {"targets": ["q_proj"]}, {"targets": ["lm_head"]}
    assert differences(old, now) == ["targets was q_proj and is lm_head"]
    now = adapted(4, base="c001", named={"model": "other"})
    old["named"] = {"model": "runs/book"}
    assert differences(old, now) == ["model was runs/book and is other"]
    now["named"] = old["named"]
    assert differences(old, now) == ["the model runs/book has changed since"]


def test_another_command_and_unknown_values_differ_too():
    assert len(differences(adapted(4), described(NOW))) == 1
    assert differences(described(NOW, strange=1), described(NOW)) == [
        "strange was 1 and is not given"
    ]


def test_settings_and_flags_of_earlier_versions_have_their_present_names():
    stored = {"clip": 0.5, "accumulation": 2, "keep_hidden": 0.0, "seed": 3}
    now = {"max_grad_norm": 0.5, "grad_accum_steps": 2, "cache_gib": 0.0, "seed": 3}
    assert with_current_names(stored) == now
    words = ["text.txt", "--clip=0.5", "--keep-in", "clip", "--seed", "3"]
    told = ["text.txt", "--max-grad-norm=0.5", "--cache-dir", "clip", "--seed", "3"]
    assert with_current_flags(words) == told
    assert with_current_flags(told) == told


def test_every_former_flag_and_key_has_its_name_of_now():
    words = ["train", "a.txt", "--from", "m", "--weights=3:1", "--n-lags", "2", "--form", "F32"]
    now = ["train", "a.txt", "--init-from", "m", "--mix=3:1", "--n-prev-tokens", "2"]
    assert with_current_flags(words) == [*now, "--format", "F32"]
    text = 'from = "m"\nkeep-hidden = 2\n# weights = 1\nn_lags=3\nmax_steps = 4\n'
    assert with_current_config(text) == (
        'init_from = "m"\ncache_gib = 2\n# weights = 1\nn_prev_tokens=3\nmax_steps = 4\n'
    )
