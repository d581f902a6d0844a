import json
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, random_ids, randomise, tiny_model

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

CONFIG, TENSORS, TOKENIZER, MANIFEST = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "MANIFEST.json",
)


def saved(folder, name="gpt2"):
    """A model and the folder that it was saved to."""
    model = tiny_model(CONFIGS[name])
    save_model(model, folder)
    return model


def rewrite(folder, change):
    """Change the tensors of a folder; its manifest, which would notice, goes."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    (folder / MANIFEST).unlink(missing_ok=True)


def rewrite_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / MANIFEST).unlink(missing_ok=True)


def assert_same_bits(model, other):
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_to_the_bit(name, tmp_path):
    model = saved(tmp_path / "model", name)
    opened, tokenizer = open_model(tmp_path / "model")
    assert tokenizer is None
    assert not opened.training
    assert opened.config == model.config
    assert_same_bits(opened, model)
    ids = random_ids(model.config, 2, 9)
    assert torch.equal(opened(ids), model(ids))
    assert all(parameter.requires_grad for parameter in opened.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays_and_is_written(dtype, tmp_path):
    model = tiny_model(CONFIGS["llama"]).to(dtype)
    save_model(model, tmp_path / "model")
    opened, _ = open_model(tmp_path / "model")
    assert_same_bits(opened, model)
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
    inject_lora(model, "lm_head", rank=2)
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
    inject_lora(model, "lm_head", rank=2)
    remove_lora(model)
    save_model(model, tmp_path / "model")
    assert open_model(tmp_path / "model")[0].config.tie_head


def test_a_model_that_carries_a_lora_is_not_saved(tmp_path):
    model = tiny_model(CONFIGS["gpt2"])
    inject_lora(model, "q_proj")
    with pytest.raises(SurgeryError, match=r"carries a LoRA.*\n.*save_adapter.*merge_lora"):
        save_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_our_own_kind_is_said_in_the_config(tmp_path):
    saved(tmp_path / "model", "rotary-layernorm-gelu")
    contents = json.loads((tmp_path / "model" / CONFIG).read_text())
    assert contents["model_type"] == "nanogpt_surgery"


def test_a_model_is_saved_over_the_folder_it_was_opened_from(tmp_path):
    saved(tmp_path / "model", "gpt2")
    opened, _ = open_model(tmp_path / "model")
    before = opened(random_ids(opened.config, 1, 7))
    save_model(tiny_model(opened.config, seed=9), tmp_path / "model")
    assert torch.equal(opened(random_ids(opened.config, 1, 7)), before)
    save_model(opened, tmp_path / "model")
    again, _ = open_model(tmp_path / "model")
    assert_same_bits(again, opened)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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
    with pytest.raises(SurgeryError, match="was not written by this program"):
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


# What does not fit is refused, everything at once.


@pytest.mark.parametrize("name", ["gpt2", "llama", "rotary-layernorm-gelu"])
def test_missing_unknown_and_misshapen_tensors_are_named_at_once(name, tmp_path):
    saved(tmp_path / "model", name)

    def damage(tensors):
        norm = next(n for n in tensors if n.endswith(("ln_f.weight", "norm.weight")) and "." in n)
        tensors.pop(norm)
        head = next(n for n in tensors if n.endswith(("wte.weight", "embed_tokens.weight")))
        tensors[head] = tensors[head][:-1].clone()
        tensors["stranger.weight"] = torch.ones(3)

    rewrite(tmp_path / "model", damage)
    with pytest.raises(SurgeryError) as caught:
        open_model(tmp_path / "model")
    for fragment in (
        "norm.weight is missing",
        "embed_tokens.weight is (52, 24), the config says (53, 24)",
        "stranger.weight is unknown",
    ):
        assert fragment in caught.value.what


def test_a_long_list_of_problems_is_counted(tmp_path):
    saved(tmp_path / "model", "llama")
    rewrite(tmp_path / "model", lambda tensors: tensors.clear())
    with pytest.raises(SurgeryError, match=r"is missing; \d+ more"):
        open_model(tmp_path / "model")


def test_a_tied_model_without_its_embedding_is_refused(tmp_path):
    saved(tmp_path / "model", "gpt2")
    rewrite(tmp_path / "model", lambda tensors: tensors.pop("transformer.wte.weight"))
    with pytest.raises(SurgeryError, match=r"embed_tokens\.weight is missing"):
        open_model(tmp_path / "model")


def test_a_head_that_contradicts_its_tie_is_refused(tmp_path):
    saved(tmp_path / "model", "gpt2-gelu-untied")
    rewrite_config(tmp_path / "model", tie_word_embeddings=True)
    with pytest.raises(SurgeryError, match=r"lm_head\.weight differs from the embedding"):
        open_model(tmp_path / "model")


def test_a_head_that_repeats_the_embedding_is_fine(tmp_path):
    model = saved(tmp_path / "model", "gpt2")

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    rewrite(tmp_path / "model", repeat)
    assert_same_bits(open_model(tmp_path / "model")[0], model)


def test_whole_numbers_are_no_weights(tmp_path):
    saved(tmp_path / "model", "llama")

    def quantise(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    rewrite(tmp_path / "model", quantise)
    with pytest.raises(SurgeryError, match=r"norm\.weight holds torch\.int8"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("name", [CONFIG, TENSORS, TOKENIZER])
def test_a_flipped_bit_is_noticed(name, tmp_path):
    tokenizer = CharacterTokenizer("abc")
    save_model(SimpleGPT(3, n_embd=16, n_layer=1), tmp_path / "model", tokenizer)
    path = tmp_path / "model" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SurgeryError, match=rf"{name} has changed .*sha256"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("kept", ["nothing", "header", "all but one byte"])
def test_a_truncated_file_is_noticed(name, kept, tmp_path):
    saved(tmp_path / "model")
    path = tmp_path / "model" / name
    data = path.read_bytes()
    length = {"nothing": 0, "header": 30, "all but one byte": len(data) - 1}[kept]
    path.write_bytes(data[:length])
    with pytest.raises(
        SurgeryError, match=rf"{name} has {length:,} bytes instead of {len(data):,}"
    ):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("length", [0, 4, 30, 400, -1])
def test_a_truncated_file_without_a_manifest_is_noticed_too(length, tmp_path):
    saved(tmp_path / "model")
    (tmp_path / "model" / MANIFEST).unlink()
    path = tmp_path / "model" / TENSORS
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SurgeryError, match="is not a safetensors file"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_named(name, tmp_path):
    saved(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(SurgeryError, match=name):
        open_model(tmp_path / "model")


def test_a_path_that_holds_no_model_is_refused_with_a_hint(tmp_path):
    with pytest.raises(SurgeryError, match=r"there is no such folder\n.*surgery train"):
        open_model(tmp_path / "nothing")
    with pytest.raises(SurgeryError, match=r"it holds no config\.json"):
        open_model(tmp_path)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_open_or_give_our_own_error(data, tmp_path):
    folder = tmp_path / "model"
    if not folder.exists():
        saved(folder, "llama")
        (folder / MANIFEST).unlink()
        (tmp_path / "whole").write_bytes((folder / TENSORS).read_bytes())
    contents = bytearray((tmp_path / "whole").read_bytes())
    header = int.from_bytes(contents[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 8 + header - 1))
        contents[place] = data.draw(st.integers(0, 255))
    (folder / TENSORS).write_bytes(contents)
    try:
        open_model(folder)
    except SurgeryError as error:
        assert str(folder) in str(error)
