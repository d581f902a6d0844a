"""LoRA both ways with PEFT: what it matches, what it computes, what it writes and what it reads."""

import re

import peft
import pytest
import torch
from helpers.models import (
    FAMILY_CONFIGS,
    assert_equal_logits,
    random_ids,
    randomise,
    tiny_model,
    train_a_little,
)
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nanogpt_surgery import (
    LoRALinear,
    SurgeryError,
    inject_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    save_model,
)
from nanogpt_surgery.lora.several import lora_layers
from nanogpt_surgery.lora.targets import find_targets

pytestmark = [  # PEFT's own, none of which ours can help
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is"),
]
FAMILIES = ["gpt2", "gpt2-gelu-untied", "llama", "llama-scaled-tied", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """Where each tiny base model lies, written once."""
    root = tmp_path_factory.mktemp("bases")

    def folder(name: str):
        if not (root / name).exists():
            save_model(tiny_model(FAMILY_CONFIGS[name]), root / name)
        return root / name

    return folder


@pytest.fixture
def theirs(base_folder):
    """The tiny base model as transformers reads it."""
    return lambda name: AutoModelForCausalLM.from_pretrained(base_folder(name)).eval()


def assert_equal(ours: nn.Module, theirs: nn.Module, config, moved_from: nn.Module) -> None:
    """Equal logits on the same ids, and an adapter that is seen to do something."""
    ids = random_ids(config, 2, 9)
    with torch.no_grad():
        expected, actual, base = theirs(ids).logits, ours(ids), moved_from(ids)
    actual = getattr(actual, "logits", actual)
    assert_equal_logits(actual, expected)
    assert (actual - getattr(base, "logits", base)).abs().max() > 0.1 * actual.std()


OURS = ["q_proj", ["q_proj", "k_proj", "v_proj"], "all-linear", r".*_proj|lm_head"]


@pytest.mark.parametrize("targets", OURS, ids=["q", "qkv", "all-linear", "with-head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_reads_what_is_written_here(name, targets, theirs, tmp_path):
    config = FAMILY_CONFIGS[name]
    model = tiny_model(config)
    inject_lora(model, targets, rank=3, alpha=5, tied="untie")
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(theirs(name), tmp_path / "adapter")
    assert_equal(model, adapted, config, moved_from=tiny_model(config))


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_peft_reads_layers_with_ranks_and_scales_of_their_own(name, theirs, tmp_path):
    """In the fused c_attn of GPT-2 three such updates have to become one."""
    config = FAMILY_CONFIGS[name]
    model = tiny_model(config)
    block, other = model.layers[0], model.layers[1]
    block.self_attn.q_proj = LoRALinear(block.self_attn.q_proj, rank=2, alpha=7)
    block.self_attn.v_proj = LoRALinear(block.self_attn.v_proj, rank=5, alpha=3)
    block.mlp.up_proj = LoRALinear(block.mlp.up_proj, rank=1, alpha=4)
    other.self_attn.k_proj = LoRALinear(other.self_attn.k_proj, rank=4, alpha=4)
    other.self_attn.o_proj = LoRALinear(other.self_attn.o_proj, rank=2, alpha=1)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(theirs(name), tmp_path / "adapter")
    assert_equal(model, adapted, config, moved_from=tiny_model(config))
    again = tiny_model(config)
    load_adapter(again, tmp_path / "adapter")
    assert_equal(again, adapted, config, moved_from=tiny_model(config))


LLAMA_TARGETS = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "expression": {"target_modules": r".*layers\.1\..*(up|down|o)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head", "k_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"q_proj": 5, r"model\.layers\.1\.mlp\.up_proj": 1},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 11, "up_proj": 2},
    },
}
GPT2_TARGETS = {
    "fused": {"target_modules": ["c_attn"]},
    "all-linear": {"target_modules": "all-linear"},
    "projections": {"target_modules": ["c_proj"]},  # of the attention and of the MLP
    "head": {"target_modules": ["c_attn", "lm_head"]},
    "patterns": {
        "target_modules": ["c_attn", "c_fc"],
        "rank_pattern": {"c_attn": 4, r"transformer\.h\.1\.mlp\.c_fc": 2},
        "alpha_pattern": {r"h\.0\.attn\.c_attn": 9},
    },
}
THEIRS = [
    (name, options)
    for name in FAMILIES
    for options in (GPT2_TARGETS if name.startswith("gpt2") else LLAMA_TARGETS).values()
]


@pytest.mark.parametrize(("name", "options"), THEIRS)
def test_what_peft_writes_is_read_here(name, options, theirs, tmp_path):
    config = FAMILY_CONFIGS[name]
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        fan_in_fan_out=name.startswith("gpt2"),
        **options,
    )
    adapted = peft.get_peft_model(theirs(name), settings).eval()
    train_a_little(adapted)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = tiny_model(config)
    load_adapter(model, tmp_path / "adapter", tied="untie")
    assert_equal(model, adapted, config, moved_from=tiny_model(config))


PATTERNS = [
    ["q_proj"],
    ["q_proj", "v_proj", "down_proj"],
    ["mlp.up_proj"],
    ["layers.1.self_attn.o_proj"],
    ["model.layers.0.mlp.down_proj"],
    ["lm_head", "k_proj"],
    ["proj"],
    ["q_prj"],
    r".*\.(q|k)_proj",
    r".*layers\.1\..*_proj",
    r"model\.layers\.0\.mlp\.(gate|up)_proj|lm_head",
    r"model\.layers\.0",
    "all-linear",
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_patterns_match_what_peft_s_match(name, pattern, base_folder):
    config = AutoConfig.from_pretrained(base_folder(name))
    model = AutoModelForCausalLM.from_config(config)
    try:
        matches = find_targets(model, pattern)
        ours = {name for names in matches.values() for name in names}
    except SurgeryError:
        ours = set()
    try:
        tuner = peft.get_peft_model(model, peft.LoraConfig(target_modules=pattern)).base_model
        wrapped = {n for n, m in tuner.model.named_modules() if isinstance(m, LoraLayer)}
    except ValueError as error:
        assert re.search("No modules|not found in the base model|is not supported", str(error))
        wrapped = set()
    assert ours == wrapped


def test_all_linear_finds_the_output_layer_of_a_transformers_model(theirs):
    model = theirs("qwen3")
    assert "lm_head" not in find_targets(model, "all-linear")["all-linear"]
    model.head = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.head
    names = find_targets(model, "all-linear")["all-linear"]
    assert len(names) == 2 * 7
    assert "head" not in names


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_surgery_on_a_transformers_model_computes_what_peft_does(name, theirs, tmp_path):
    config = FAMILY_CONFIGS[name]
    model = theirs(name)
    inject_lora(model, "all-linear", rank=3, alpha=5)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(theirs(name), tmp_path / "adapter")
    assert_equal(model, adapted, config, moved_from=theirs(name))


def test_merged_weights_are_peft_s(theirs, tmp_path):
    config = FAMILY_CONFIGS["llama"]
    model = tiny_model(config)
    inject_lora(model, r".*_proj|lm_head", rank=3, alpha=5, tied="untie")
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(
        theirs("llama"), tmp_path / "adapter"
    ).merge_and_unload()
    names = list(lora_layers(model))
    merge_lora(model)
    for name in names:
        weight = merged.get_parameter(("" if name == "lm_head" else "model.") + name + ".weight")
        torch.testing.assert_close(model.get_parameter(f"{name}.weight"), weight)


def test_a_freshly_injected_model_is_drawn_as_peft_draws(theirs):
    """A uniform with the same bound, B zero: the spread of many draws agrees."""
    torch.manual_seed(0)
    ours, wide = nn.Sequential(nn.Linear(300, 40)), nn.Sequential(nn.Linear(300, 40))
    inject_lora(ours, "0", rank=40)
    config = peft.LoraConfig(r=40, target_modules=["0"])
    other = peft.get_peft_model(randomise(wide), config).base_model.model[0]
    a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
    layer = lora_layers(ours)["0"]
    assert a.shape == layer.lora_A.shape
    assert abs(layer.lora_A.abs().max() / a.abs().max() - 1) < 1e-3
    assert abs(layer.lora_A.std() / a.std() - 1) < 0.03
    assert not b.any()
    assert not layer.lora_B.any()
