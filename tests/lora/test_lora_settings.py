import math
from typing import get_args

import pytest
import torch
from helpers.builds import MODELS, logits, some_ids

from nanogpt_surgery import (
    GPTDataset,
    LoRALinear,
    LoRASettings,
    SurgeryError,
    fit,
    inject_lora,
    plan_lora,
    save_adapter,
    tensor_hashes,
)
from nanogpt_surgery.cli.framework.options import options_of
from nanogpt_surgery.lora.several import lora_layers


def test_settings_that_contradict_are_told_all_at_once():
    with pytest.raises(SurgeryError) as caught:
        LoRASettings(
            rank=0,
            alpha=math.nan,
            dropout=1.0,
            rank_pattern={"q_proj": -1, "v_proj": 1},
            alpha_pattern={"v_proj": 0},
            tied="loose",
        )
    message = str(caught.value)
    for part in (
        "rank is 0; it must be a positive integer",
        "rank_pattern of 'q_proj' is -1",
        "alpha is nan; it must be a number above 0",
        "alpha_pattern of 'v_proj' is 0",
        "dropout is 1.0",
        "tied is 'loose'; it must be one of refuse, untie, both",
    ):
        assert part in message
    assert "'v_proj' is 1" not in message


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": "8"}, "rank is '8'; it must be a positive integer"),
        ({"rank": 2.5}, "rank is 2.5; it must be a positive integer"),
        ({"rank": True}, "rank is True; it must be a positive integer"),
        ({"alpha": "16"}, "alpha is '16'; it must be a number above 0"),
        ({"dropout": "0.1"}, "dropout is '0.1'; it must be a number"),
        ({"rank_pattern": 4}, "rank_pattern is 4; it must be a table"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern of 'q_proj' is '2'"),
        ({"dora": "yes"}, "dora is 'yes'; it must be true or false"),
    ],
)
def test_a_value_of_another_type_is_answered_in_a_sentence(wrong, said):
    with pytest.raises(SurgeryError) as caught:
        LoRASettings(**wrong)
    assert said in str(caught.value)


@pytest.mark.parametrize("alpha", [math.inf, 1e30, 10**400], ids=["inf", "1e30", "10^400"])
def test_an_alpha_that_no_file_may_hold_is_refused(alpha):
    for settings in ({"alpha": alpha}, {"alpha_pattern": {"q_proj": alpha}}):
        with pytest.raises(SurgeryError, match=r"alpha.* 1e30"):
            LoRASettings(**settings)


@pytest.mark.parametrize("alpha", [9e29, 1e-30])
def test_every_alpha_that_is_taken_can_be_saved(alpha, tmp_path):
    model, ids = MODELS["SimpleGPT"](), some_ids()
    before = logits(model, ids)
    inject_lora(model, "q_proj", alpha=alpha, alpha_pattern={"layers.0.self_attn.q_proj": alpha})
    assert torch.equal(logits(model, ids), before)
    save_adapter(model, tmp_path / "adapter")


def test_settings_and_changes_say_the_same_in_three_ways():
    ways = (
        {"rank": 3, "alpha": 5, "rslora": True, "rank_pattern": {"v_proj": 2}},
        {"settings": LoRASettings(3, 5, rslora=True), "rank_pattern": {"v_proj": 2}},
        {"settings": LoRASettings(3, 9, rslora=True, rank_pattern={"v_proj": 2}), "alpha": 5},
    )
    found = []
    for way in ways:
        model = MODELS["SimpleGPT"]()
        plan = plan_lora(model, **way)
        report = inject_lora(model, **way)
        assert plan.summary["trainable_parameters"] == report.summary["trainable_parameters"]
        scales = {path: layer.scaling for path, layer in lora_layers(model).items()}
        found.append((plan.to_dict(), report.to_dict(), scales))
    assert found[0] == found[1] == found[2]
    assert set(found[0][2].values()) == {5 / math.sqrt(3), 5 / math.sqrt(2)}


def test_one_source_for_each_default():
    settings, model = LoRASettings(), MODELS["SimpleGPT"]()
    inject_lora(model)
    for layer in [LoRALinear(model.lm_head), *lora_layers(model).values()]:
        assert list(layer.updates) == [settings.name]
        assert (layer.rank, layer.alpha) == (settings.rank, settings.alpha)
        assert layer.updates[settings.name].dropout.p == settings.dropout


@pytest.mark.parametrize("verb", [inject_lora, plan_lora])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rnk": 4}, r"LoRASettings have no rnk\n.*rank"),
        ({"r": 4, "lora_alpha": 8}, r"no r, lora_alpha\n.*; alpha"),
        ({"settings": 4}, r"settings is 4 .*LoRASettings.*\n.*rank=4"),
    ],
)
def test_a_setting_that_is_none_is_refused_with_the_nearest(verb, wrong, message):
    model = MODELS["SimpleGPT"]()
    before, modules = tensor_hashes(model), dict(model.named_modules())
    with pytest.raises(SurgeryError, match=message):
        verb(model, "q_proj", **wrong)
    assert tensor_hashes(model) == before
    assert dict(model.named_modules()) == modules


def test_a_training_refuses_in_the_same_way():
    model = MODELS["SimpleGPT"]()
    with pytest.raises(SurgeryError, match=r"FitSettings have no learnig_rate\n.*learning_rate"):
        fit(model, GPTDataset.from_ids(torch.arange(40), 10), learnig_rate=1.0)


def test_every_setting_has_a_flag_with_its_words():
    flags = get_args(options_of(LoRASettings, "LoRA"))[0].__dataclass_fields__
    assert list(flags) == list(LoRASettings().to_dict())
    helps = {name: flag.type.__metadata__[0].help for name, flag in flags.items()}
    assert all(helps.values())
    assert helps["rank"] == "rank of each update"
