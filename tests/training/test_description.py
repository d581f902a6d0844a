"""What an older description is taken to say, and the flags that bring it back."""

from dataclasses import replace
from pathlib import Path

import pytest

from nanogpt_surgery import FitSettings, GPTConfig, LoRASettings
from nanogpt_surgery.runs.description import differences, refusal
from nanogpt_surgery.training.recipes import MUON, RECIPES, further_values

ADAMW, NOW = FitSettings(), FitSettings(**MUON)
FAST = GPTConfig(65, **RECIPES["fast"].model, block_size=64)


def described(settings: FitSettings, *unknown: str, **more: object) -> dict:
    """A description by a version that did not know some settings yet."""
    values = settings.to_dict()
    known = {name: value for name, value in values.items() if name not in unknown}
    return {"kind": "train", "settings": known, **more}


def adapted(rank: int, **more: object) -> dict:
    adapter = LoRASettings(rank=rank).to_dict()
    rows = [{"layer": "layers.0.self_attn.q_proj", "rank": rank}]
    return {
        "kind": "finetune",
        "lora": {"rows": rows, "trainable_parameters": 8 * rank},
        "adapter": adapter,
        "settings": ADAMW.to_dict(),
        "block_size": 64,
        "train_ids": "d78d",
        "base": "b45e",
        **more,
    }


def refused(old: dict, now: dict) -> tuple[str, str]:
    """What is said differs, and what to do."""
    error = refusal(Path("run"), old, now)
    assert error
    said = error.what.removeprefix("this is not the run that run holds: ")
    return said, error.hint.removesuffix("; or choose a new --out")


def test_before_evaluations_read_a_part_they_read_all():
    old, now = described(NOW, "evaluate_tokens"), described(NOW)
    said = ("evaluate-tokens was 0 and is 262144", "resume with --evaluate-tokens 0")
    assert refused(old, now) == said
    assert differences(old, described(replace(NOW, evaluate_tokens=0))) == []


@pytest.mark.parametrize(
    ("old", "now", "flags"),
    [
        (ADAMW, NOW, "--no-muon"),
        (NOW, ADAMW, "--muon"),
        (replace(ADAMW, clip=0.5), NOW, "--no-muon --clip 0.5"),
        (replace(NOW, seed=3), NOW, "--seed 3"),
        (replace(NOW, gradient_checkpointing=True), NOW, "--gradient-checkpointing"),
    ],
)
def test_the_flags_bring_back_what_was(old, now, flags):
    """Also those that follow from others in `train`, and so need no flags."""
    assert refused(described(old), described(now))[1] == f"resume with {flags}"


def test_a_fine_tuning_by_muon_is_told_its_values():
    """There the defaults are AdamW's in any case."""
    old, now = adapted(4, settings=NOW.to_dict()), adapted(4)
    flags = refused(old, now)[1].removeprefix("resume with ").split(" --")
    assert {"learning-rate 0.03", "clip 0.0"} < {*flags}
    assert "--muon" in " --".join(["", *flags])


def test_a_recipe_is_one_flag_beside_those_that_go_beyond_it():
    old = described(
        replace(NOW, max_steps=60, evaluate_every=20),
        recipe="fast",
        model=replace(FAST, n_lags=2).to_dict(),
        block_size=64,
        train_ids="d78d",
    )
    now = described(
        NOW, recipe=None, model=GPTConfig(65).to_dict(), block_size=256, train_ids="4129"
    )
    said, hint = refused(old, now)
    flags = "--recipe fast --block-size 64 --n-lags 2 --max-steps 60 --evaluate-every 20"
    assert hint == f"resume with {flags}"
    assert said.startswith("recipe was fast and is not given; block-size was 64 and is 256; n-lags")
    assert "4129" not in said
    flags = "--block-size 256 --n-lags 0 --max-steps 2000 --evaluate-every 250, without --recipe"
    assert refused(now, old)[1] == f"resume with {flags}"


def test_sizes_that_follow_from_others_need_no_flags():
    old, now = (described(NOW, model=GPTConfig(65, n_embd=n, n_head=2).to_dict()) for n in (32, 64))
    assert refused(old, now)[1] == "resume with --n-embd 32"
    old["model"]["head_dim"] = 8
    assert refused(old, now)[1] == "resume with --n-embd 32 --head-dim 8"


def test_a_family_is_one_flag():
    families = [(None, GPTConfig(65)), ("llama", GPTConfig.for_family("llama", vocab_size=65))]
    now, old = (described(NOW, model=m.to_dict(), named={"family": f}) for f, m in families)
    assert refused(old, now)[1] == "resume with --family llama"
    assert refused(now, old)[1] == "resume without --family"


def test_another_rank_and_another_text_are_a_clause_each():
    old, now = adapted(4), adapted(8, train_ids="4129")
    assert refused(old, now) == (
        "rank was 4 and is 8; the text differs",
        "resume with --rank 4, on the text it was begun with",
    )
    old["named"], now["named"] = {"text": ["a b.txt"]}, {"text": ["books/b.txt"]}
    assert refused(old, now) == (
        "rank was 4 and is 8; the text was a b.txt and is books/b.txt",
        "resume with --rank 4, on the text 'a b.txt'",
    )
    now["named"] = {"text": ["./a b.txt"]}
    said = ("rank was 4 and is 8; a b.txt has changed since", "choose a new --out")
    assert refused(old, now) == said


def test_other_rows_of_the_same_text_are_told_by_what_cuts_them():
    old, now = adapted(4), adapted(4, train_ids="4129")
    old["named"] = {"text": ["a.jsonl"], "pack": True, "weights": None}
    now["named"] = {"text": ["a.jsonl"], "pack": False, "weights": None}
    assert refused(old, now) == ("pack was on and is off", "resume with --pack")
    now |= {"named": old["named"], "block_size": 32}
    assert refused(old, now) == ("block-size was 64 and is 32", "resume with --block-size 64")


def test_other_targets_and_another_model_are_named():
    old, now = adapted(4), adapted(4)
    now["lora"] = {"rows": [{"layer": "lm_head", "rank": 4}]}
    assert refused(old, now) == ("other layers learn", "resume with --targets q_proj")
    old["named"], now["named"] = {"targets": ["q_proj"]}, {"targets": ["lm_head"]}
    said = ("targets was q_proj and is lm_head", "resume with --targets q_proj")
    assert refused(old, now) == said
    now = adapted(4, base="c001", named={"model": "other"})
    old["named"] = {"model": "runs/book"}
    said = ("the model was runs/book and is other", "resume on the model runs/book")
    assert refused(old, now) == said
    now["named"] = old["named"]
    said = ("the weights of runs/book have changed since", "choose a new --out")
    assert refused(old, now) == said


def test_a_longer_training_is_told_why_and_what_goes_on_instead():
    error = refusal(Path("run"), described(replace(NOW, max_steps=60)), described(NOW))
    assert error
    assert error.what.endswith("max-steps was 60 and is 2000: the learning rate follows from it "
                               "in every step")  # fmt: skip
    assert "resume with --max-steps 60" in error.hint
    assert error.hint.endswith("; surgery train TEXT --from run --out NEW trains the model further")
    tuned = adapted(4, settings=replace(ADAMW, max_steps=60).to_dict())
    error = refusal(Path("run"), tuned, adapted(4))
    assert error
    assert "surgery merge MODEL run --out MERGED" in error.hint


def gone_on(model: str, base: str, config: GPTConfig, **settings: object) -> dict:
    """A training that went on from a model, whose tokenizer and sizes it has."""
    return {
        "kind": "train",
        "base": base,
        "model": config.to_dict(),
        "tokenizer": f"CharacterTokenizer {base}",
        "settings": FitSettings(**further_values(settings)).to_dict(),
        "block_size": config.block_size,
        "train_ids": base,
        "named": {"model": model, "text": ["a.txt"], "weights": None},
    }


def test_the_model_that_a_training_went_on_from_is_a_flag_that_settles_the_rest():
    old, now = gone_on("small", "b45e", GPTConfig(65)), gone_on("fast", "c001", FAST)
    assert refused(old, now) == ("from was small and is fast", "resume with --from small")
    now = gone_on("./small", "c001", GPTConfig(65))
    assert refused(old, now) == ("the weights of small have changed since", "choose a new --out")
    nothing = described(NOW, model=FAST.to_dict(), recipe="fast", named={"text": ["a.txt"]})
    said = ("from was small and is not given", "resume with --from small, without --recipe")
    assert refused(old, nothing) == (f"recipe was not given and is fast; {said[0]}", said[1])
    del nothing["recipe"]
    said = ("from was not given and is small", "resume without --from")
    assert refused(nothing, old) == said


def test_a_training_that_went_on_has_defaults_of_its_own():
    old, now = (gone_on("m", "b45e", FAST, **s) for s in ({"clip": 0.5}, {"muon": True}))
    assert refused(old, now)[1] == "resume with --no-muon --clip 0.5"
    assert refused(now, old)[1] == "resume with --muon --clip 0.0"


def test_what_another_command_made_is_said():
    said, hint = refused(adapted(4), described(NOW))
    assert said == "surgery finetune made it, and this is surgery train"
    assert hint == "choose a new --out"


def test_what_no_flag_tells_is_refused_as_well():
    assert refused(described(NOW, strange=1), described(NOW))[0] == "strange differs"
