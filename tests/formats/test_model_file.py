import copy
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.folders import CONFIG, TENSORS, assert_same_bits, rewrite, saved
from helpers.models import CONFIGS, random_ids, randomise, tiny_model
from safetensors.torch import load_file

from nanogpt_surgery import (
    CharacterTokenizer,
    GPTConfig,
    SimpleGPT,
    SurgeryError,
    inject_lora,
    merge_lora,
    open_model,
    remove_lora,
    save_model,
)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_to_the_bit(name, tmp_path):
    model = saved(tmp_path / "model", name)
    opened, tokenizer = open_model(tmp_path / "model")
    assert tokenizer is None
    assert not opened.training
    assert opened.config == model.config
    assert_same_bits(opened, model)
    assert (opened.lm_head.weight is opened.embed_tokens.weight) == model.config.tie_head
    rounded = open_model(tmp_path / "model", torch.bfloat16)[0]
    assert_same_bits(rounded, copy.deepcopy(model).bfloat16())
    ids = random_ids(model.config, 2, 9)
    assert torch.equal(opened(ids), model(ids))
    assert all(parameter.requires_grad for parameter in opened.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays_and_is_written(dtype, tmp_path):
    model = tiny_model(CONFIGS["llama"]).to(dtype)
    save_model(model, tmp_path / "model")
    opened, _ = open_model(tmp_path / "model")
    assert_same_bits(opened, model)
    assert {parameter.dtype for parameter in opened.parameters()} == {dtype}
    config = json.loads((tmp_path / "model" / CONFIG).read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_the_tokenizer_comes_back(tmp_path):
    tokenizer = CharacterTokenizer("hello, wörld 👋\n")
    model = SimpleGPT(tokenizer.vocab_size, n_embd=16, n_layer=1)
    save_model(model, tmp_path / "model", tokenizer)
    _, opened = open_model(tmp_path / "model")
    assert opened.encode("wörld 👋") == tokenizer.encode("wörld 👋")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "rotary-layernorm-gelu"])
def test_tied_stays_tied_and_untied_stays_untied(name, tied, tmp_path):
    values = CONFIGS[name].to_dict() | {"tie_head": tied}
    model = tiny_model(GPTConfig(**values))
    save_model(model, tmp_path / "model")
    opened, _ = open_model(tmp_path / "model")
    assert (opened.lm_head.weight is opened.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model" / TENSORS)) != tied
    assert_same_bits(opened, model)


@pytest.mark.parametrize("name", ["gpt2", "llama-scaled-tied", "learned-rmsnorm-swiglu"])
def test_a_merged_tied_head_is_saved_untied(name, tmp_path):
    model = tiny_model(CONFIGS[name])
    inject_lora(model, "lm_head", tied="untie", rank=2)
    randomise(model.lm_head, seed=3)
    merge_lora(model)
    save_model(model, tmp_path / "model")
    opened, _ = open_model(tmp_path / "model")
    assert not opened.config.tie_head
    assert not torch.equal(opened.lm_head.weight, opened.embed_tokens.weight)
    ids = random_ids(model.config, 2, 9)
    assert torch.equal(opened(ids), model(ids))


def test_a_tied_head_whose_lora_was_removed_is_saved_tied(tmp_path):
    model = tiny_model(CONFIGS["gpt2"])
    inject_lora(model, "lm_head", tied="untie", rank=2)
    remove_lora(model)
    save_model(model, tmp_path / "model")
    assert open_model(tmp_path / "model")[0].config.tie_head


def test_a_model_that_carries_a_lora_is_not_saved(tmp_path):
    model = tiny_model(CONFIGS["gpt2"])
    inject_lora(model, "q_proj")
    with pytest.raises(SurgeryError) as caught:
        save_model(model, tmp_path / "model")
    assert all(way in caught.value.hint for way in ("save_adapter", "merge_lora", "remove_lora"))
    assert list(tmp_path.iterdir()) == []


def test_our_own_kind_is_said_in_the_config(tmp_path):
    saved(tmp_path / "model", "rotary-layernorm-gelu")
    contents = json.loads((tmp_path / "model" / CONFIG).read_text())
    assert contents["model_type"] == "nanogpt_surgery"


def test_a_file_that_is_replaced_does_not_reach_an_open_model(tmp_path):
    model = saved(tmp_path / "model", "llama")
    opened, _ = open_model(tmp_path / "model")
    path = tmp_path / "model" / TENSORS
    (tmp_path / "other").write_bytes(bytes(path.stat().st_size))
    (tmp_path / "other").replace(path)
    assert_same_bits(opened, model)


def test_a_folder_that_is_not_ours_is_not_touched(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(SurgeryError, match=re.escape(str(tmp_path / "model"))):
        saved(tmp_path / "model")
    assert (tmp_path / "model" / "thesis.txt").read_text() == "years of work"


def test_a_moved_folder_opens(tmp_path):
    model = saved(tmp_path / "model")
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    assert_same_bits(open_model(tmp_path / "elsewhere")[0], model)


def test_gpt2_files_of_old_open(tmp_path):
    model = saved(tmp_path / "model", "gpt2")

    def age(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(model.config.n_layer):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 19, 19).tril()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(tmp_path / "model", age)
    assert_same_bits(open_model(tmp_path / "model")[0], model)


def test_opening_does_not_load_the_compiler(tmp_path):
    """Drawing weights on the meta device would: seconds for every command."""
    saved(tmp_path / "model")
    code = (
        "import sys, nanogpt_surgery as ns; ns.open_model(sys.argv[1]); "
        "sys.exit('the compiler was loaded' if 'torch._dynamo' in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True)
