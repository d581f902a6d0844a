"""Whatever a user may plausibly give instead of what is meant is our own error."""

import math

import pytest
import torch
from helpers.models import FAMILY_CONFIGS, tiny_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nanogpt_surgery import SurgeryError, generate, inject_lora, save_adapter
from nanogpt_surgery.cli.chat import ChatSettings
from nanogpt_surgery.generation.batch import generate_batch
from nanogpt_surgery.generation.settings import MOST_SEED, SamplingSettings, check_stop


@pytest.fixture(scope="module")
def model():
    return tiny_model(FAMILY_CONFIGS["llama"])


PROMPTS = [
    "text",
    None,
    3.5,
    [1.5],
    ["1"],
    [None],
    [2**70],
    torch.ones(3),
    {"ids": [1]},
    [[1], [2]],
]
SEEDS = [-1, 2**64, 2**70, 1.5, "1", True, math.nan]
COUNTS = [-1, 1.5, "5", None, True, math.nan, math.inf]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: str(p)[:20])
def test_a_prompt_that_is_no_ids(model, prompt):
    with pytest.raises(SurgeryError):
        generate(model, prompt, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_out_of_range(model, seed):
    with pytest.raises(SurgeryError, match="seed"):
        generate(model, [1], 2, seed=seed)
    with pytest.raises(SurgeryError, match="seed"):
        generate_batch(model, [[1]], 2, seed=seed)
    with pytest.raises(SurgeryError, match="seed"):
        ChatSettings(5, SamplingSettings(), (), seed)


@pytest.mark.parametrize("count", COUNTS)
def test_a_number_of_tokens_that_is_none(model, count):
    with pytest.raises(SurgeryError, match="max_new_tokens"):
        generate(model, [1], count)
    with pytest.raises(SurgeryError, match="max_new_tokens"):
        generate_batch(model, [[1]], count)


def test_the_largest_values_are_taken(model):
    assert next(iter(generate(model, [1], 2**70, seed=MOST_SEED))) >= 0
    assert len(list(generate_batch(model, [[1], [2]], 2, seed=MOST_SEED))) == 4
    assert ChatSettings(5, SamplingSettings(), (), MOST_SEED).after_an_answer().seed == 0


def test_a_model_of_transformers_is_refused_by_name():
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1)  # fmt: skip
    theirs = LlamaForCausalLM(config)
    for call in (generate, lambda model, ids, count: generate_batch(model, [ids], count)):
        with pytest.raises(SurgeryError, match="LlamaForCausalLM") as raised:
            call(theirs, [1], 2)
        assert "open_model" in raised.value.hint


WRONG = {
    "temperature": [math.nan, math.inf, -1, "1", None],
    "top_k": [0, -1, 1.5, "5", math.nan],
    "top_p": [0, 1.1, math.nan, None],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0, -1, math.inf, 1e300, 1e-300, math.nan],
    "presence_penalty": [math.nan, math.inf, "1"],
    "frequency_penalty": [math.nan, -math.inf],
    "logit_bias": [{1: math.nan}, {1: math.inf}, {"a": 1}, [1], None, {1: None}],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_a_setting_of_the_draw_that_is_none(name, value):
    with pytest.raises(SurgeryError, match=name):
        SamplingSettings(**{name: value})


def test_a_ban_of_every_id_is_said(model):
    banned = SamplingSettings(logit_bias=dict.fromkeys(range(model.config.vocab_size), -math.inf))
    with pytest.raises(SurgeryError, match="every id"):
        next(iter(generate(model, [1], 2, sampling=banned)))


def test_a_stop_that_is_one_text():
    with pytest.raises(SurgeryError, match="stop"):
        check_stop("end")


@pytest.mark.parametrize("name", ["all_linear", "all linear", "ALL-LINEAR", "AllLinear"])
def test_all_linear_is_meant(model, name):
    with pytest.raises(SurgeryError) as raised:
        inject_lora(model, name)
    assert "'all-linear'" in raised.value.hint


MEANT = {
    "c_attn": {"q_proj", "k_proj", "v_proj"}, "query_key_value": {"q_proj", "k_proj", "v_proj"},
    "W_pack": {"q_proj", "k_proj", "v_proj"}, "wq": {"q_proj"}, "wk": {"k_proj"},
    "wo": {"o_proj"}, "fc1": {"up_proj"}, "w2": {"down_proj"}, "c_proj": {"o_proj", "down_proj"},
    "wte": {"embed_tokens"}, "h.0.attn.c_attn": {"q_proj", "k_proj", "v_proj"},
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT)
def test_the_names_of_other_families_are_understood(model, name):
    with pytest.raises(SurgeryError) as raised:
        inject_lora(model, name)
    assert set(raised.value.hint.removeprefix("the nearest: ").split(", ")) == MEANT[name]


@pytest.mark.parametrize("targets", ["a{99999999999}", "(", 3, None, [None], b"q_proj"])
def test_a_target_that_is_none(model, targets):
    with pytest.raises(SurgeryError):
        inject_lora(model, targets)


def test_an_adapter_of_a_plain_module_opens_in_peft(tmp_path):
    from peft import PeftModel

    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 9))

    ours = plain()
    inject_lora(ours, "0", rank=2)
    with torch.no_grad():
        ours[0].lora_B.normal_()
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(plain(), tmp_path / "adapter")
    x = torch.randn(3, 8)
    torch.testing.assert_close(theirs(x), ours(x))
    assert not torch.allclose(ours(x), plain()(x))
