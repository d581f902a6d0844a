"""Options of foreign files: computed, let pass where they cannot matter, or refused by name."""

import contextlib
import json
import random

import gguf
import pytest
import torch
from helpers.llama_cpp import assert_goes_on_alike, greedy_text
from helpers.models import FAMILY_CONFIGS, assert_equal_logits, random_ids, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from nanogpt_surgery import CharacterTokenizer, GPTConfig, SurgeryError, open_model, save_model
from nanogpt_surgery.formats.gguf.writing import save_gguf
from nanogpt_surgery.formats.huggingface.config import (
    _FIELDS,
    _GPT2_VALUES,
    _INERT_OPTIONS,
    _LLAMA_VALUES,
    _ROPE_OPTIONS,
    _ROPE_TYPES,
    _SHARED_VALUES,
    MODEL_TYPES,
)

LETTERS = CharacterTokenizer("the quick brown fox jumps over the lazy dog")
T = gguf.GGUFValueType


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def saved(folder, family="llama"):
    save_model(tiny_model(FAMILY_CONFIGS[family]), folder)
    (folder / "MANIFEST.json").unlink()
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "gpt2-gelu-untied"])
def test_weights_without_the_prefix_open(family, tmp_path):
    saved(tmp_path / "m", family)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    flat = {n.removeprefix("model.").removeprefix("transformer."): t for n, t in tensors.items()}
    assert flat.keys() != tensors.keys()
    ids = random_ids(FAMILY_CONFIGS[family], 1, 9)
    with torch.no_grad():
        before = open_model(tmp_path / "m")[0](ids)
        save_file(flat, path, {"format": "pt"})
        assert torch.equal(open_model(tmp_path / "m")[0](ids), before)


NAMES = {  # what becomes of one tensor, its name in the file, and the name that is missing then
    "llama": ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_projj.weight"),
    "gpt2": ("transformer.h.1.mlp.c_fc.bias", "transformer.h.1.mlp.c_fcc.bias"),
}


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("family", NAMES)
def test_missing_unknown_and_misshapen_tensors_have_the_names_of_the_file(family, prefix, tmp_path):
    saved(tmp_path / "m", family)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    old, new = NAMES[family]
    tensors[new] = tensors.pop(old)
    fused = next(name for name in tensors if name.endswith(("q_proj.weight", "c_attn.weight")))
    tensors[fused] = tensors[fused][:, :-3].clone()

    def named(name):
        return name if prefix else name.removeprefix("model.").removeprefix("transformer.")

    save_file({named(name): t for name, t in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(SurgeryError) as refusal:
        open_model(tmp_path / "m")
    said = refusal.value.what
    assert f" {named(old)} is missing (there is {named(new)})" in said
    assert f" {named(new)} is unknown" in said
    assert f" {named(fused)} is {tuple(tensors[fused].shape)}" in said


def test_a_missing_tensor_of_a_gguf_file_has_its_name_there(one, tmp_path):
    copy_with(one, tmp_path / "m.gguf", {}, rename={"blk.1.ffn_up.weight": "blk.1.fnn_up.weight"})
    with pytest.raises(SurgeryError, match=r"blk\.1\.ffn_up\.weight .*blk\.1\.fnn_up\.weight"):
        open_model(tmp_path / "m.gguf")


LONG = [1.0] * (FAMILY_CONFIGS["qwen3"].head_dim // 2)
PASSED = [
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 300.0}}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 1.0}}),
    ("llama", {"partial_rotary_factor": 1.0, "pretraining_tp": 1, "logit_scale": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4096}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 3}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 19,
               "layer_types": ["sliding_attention", "full_attention"]}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 1.0, "rope_theta": 1e4,
               "beta_fast": 16, "original_max_position_embeddings": 8}}),
    ("qwen3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 1.0,
               "short_factor": LONG, "long_factor": LONG,
               "original_max_position_embeddings": 8}}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), PASSED)
def test_what_is_let_pass_is_computed_as_transformers_does(family, changes, tmp_path):
    saved(tmp_path / "m", family)
    change_config(tmp_path / "m", **changes)
    ours, _ = open_model(tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    ids = random_ids(FAMILY_CONFIGS[family], 2, 17)
    with torch.no_grad():
        assert_equal_logits(ours(ids), theirs.eval()(ids).logits)
    save_model(ours, tmp_path / "again")
    assert open_model(tmp_path / "again")[0].config == ours.config


REFUSED = [
    ("rope_type", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    ("rope_type", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}),
    ("rope_type", {"rope_scaling": {"rope_type": "yarn", "factor": 1.0, "attention_factor": 2}}),
    ("rope_type", {"rope_parameters": {"rope_type": "dynamic", "factor": 1e20}}),
    ("rope_type", {"rope_parameters": {"rope_type": "proportional", "factor": 4.0}}),
    ("mrope_section", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 1]}}),
    ("short_factor", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1, 2]}}),
    ("partial_rotary_factor", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
                               "partial_rotary_factor": 0.5}}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("layer_types", {"layer_types": ["sliding_attention"], "sliding_window": 4}),
    ("hidden_act", {"hidden_act": "relu"}),
    *[(name, {name: 0.5}) for name in
      ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "embedding_multiplier",
       "residual_multiplier", "clip_qkv", "attention_multiplier")],
    ("num_local_experts", {"num_local_experts": 8}),
    ("is_causal", {"is_causal": False}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), REFUSED)
def test_what_would_change_the_result_is_refused_by_name(name, changes, tmp_path):
    saved(tmp_path / "m")
    change_config(tmp_path / "m", **changes)
    with pytest.raises(SurgeryError) as refusal:
        open_model(tmp_path / "m")
    assert name in refusal.value.what


# Fields that no logit depends on: names, training, what is returned, other heads than ours.
HARMLESS = set(
    """
    transformers_version architectures output_hidden_states output_attentions return_dict dtype
    chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type initializer_range
    use_cache pad_token_id bos_token_id eos_token_id _name_or_path model_type embd_pdrop attn_pdrop
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    """.split()
)
# Read by rules of their own, each with rows in PASSED or REFUSED.
RULES = {"rope_parameters", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window",
         "max_window_layers", "layer_types"}  # fmt: skip


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_every_field_of_the_installed_transformers_is_known(name):
    family = MODEL_TYPES[name]
    theirs = set(AutoConfig.for_model(name).to_dict())
    refused = _SHARED_VALUES | (_GPT2_VALUES if family == "gpt2" else _LLAMA_VALUES)
    known = HARMLESS | (RULES if family != "gpt2" else set()) | set(refused)
    assert theirs - known == set(_FIELDS[family].values()) & theirs


def test_every_rotary_option_of_the_installed_transformers_is_known():
    assert set(RopeParameters.__annotations__) <= {
        *_ROPE_OPTIONS, *_INERT_OPTIONS, "partial_rotary_factor", "mrope_section"
    }  # fmt: skip
    assert set(ROPE_INIT_FUNCTIONS) <= {
        *_ROPE_TYPES, "dynamic", "yarn", "longrope", "proportional"
    }  # fmt: skip


def copy_with(source, goal, extra, drop=(), rename=None):
    """A GGUF file again, with more metadata."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(goal, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in {*extra, *drop}:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == T.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, inner)
    for key, (value, kind) in extra.items():
        writer.add_key_value(key, value, kind, T.INT32 if kind == T.ARRAY else None)
    for tensor in reader.tensors:
        name = (rename or {}).get(tensor.name, tensor.name)
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    config = FAMILY_CONFIGS["llama"].to_dict()
    sizes = {"vocab_size": LETTERS.vocab_size, "n_embd": 96, "head_dim": 16, "n_inner": 160}
    path = tmp_path_factory.mktemp("gguf") / "one.gguf"
    save_gguf(tiny_model(GPTConfig(**config | sizes | {"block_size": 64})), path, LETTERS, "F32")
    return path


SCALED = {
    "factor alone": {"llama.rope.scaling.factor": (4.0, T.FLOAT32)},
    "linear": {
        "llama.rope.scaling.type": ("linear", T.STRING),
        "llama.rope.scaling.factor": (4.0, T.FLOAT32),
    },
    "older": {"llama.rope.scale_linear": (4.0, T.FLOAT32)},
    "yarn of 1": {
        "llama.rope.scaling.type": ("yarn", T.STRING),
        "llama.rope.scaling.factor": (1.0, T.FLOAT32),
    },
    "none": {
        "llama.rope.scaling.type": ("none", T.STRING),
        "llama.rope.scaling.factor": (4.0, T.FLOAT32),
    },
}


@pytest.mark.parametrize("kind", SCALED)
def test_a_factor_scales_as_in_llama_cpp(kind, one, tmp_path):
    copy_with(one, tmp_path / "m.gguf", SCALED[kind])
    model, tokenizer = open_model(tmp_path / "m.gguf")
    scaling = model.config.rope_scaling
    assert (scaling and (scaling.rope_type, scaling.factor)) == (
        None if kind in ("none", "yarn of 1") else ("linear", 4.0)
    )
    prompt = "the quick brown fox jumps over"
    assert_goes_on_alike(model, tokenizer, prompt, greedy_text(tmp_path / "m.gguf", prompt, 8), 8)
    save_gguf(model, tmp_path / "again.gguf", tokenizer, "F32")
    assert open_model(tmp_path / "again.gguf")[0].config == model.config


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("rope.scaling.type", "yarn", T.STRING),
        ("rope.scaling.type", "longrope", T.STRING),
        ("rope.dimension_count", 8, T.UINT32),
        ("attention.causal", False, T.BOOL),
        ("logit_scale", 0.5, T.FLOAT32),
        ("residual_scale", 0.5, T.FLOAT32),
        ("embedding_scale", 2.0, T.FLOAT32),
        ("attention.clamp_kqv", 3.0, T.FLOAT32),
        ("attn_logit_softcapping", 30.0, T.FLOAT32),
        ("rope.scaling.attn_factor", 0.5, T.FLOAT32),
        ("expert_count", 8, T.UINT32),
        ("attention.sliding_window", 4, T.UINT32),
        ("ssm.inner_size", 4, T.UINT32),
    ],
)
def test_a_key_that_would_change_the_result_is_refused_by_name(key, value, kind, one, tmp_path):
    copy_with(one, tmp_path / "m.gguf", {f"llama.{key}": (value, kind)})
    with pytest.raises(SurgeryError) as refusal:
        open_model(tmp_path / "m.gguf")
    assert f"llama.{key}" in refusal.value.what
    assert str(tmp_path / "m.gguf") in refusal.value.what


WRONG = [
    ("x" * 5000, T.STRING), (-3, T.INT32), (2**40, T.UINT64), (float("nan"), T.FLOAT32),
    (float("inf"), T.FLOAT32), (True, T.BOOL), ([1, 2], T.ARRAY), (0, T.UINT32),
]  # fmt: skip


def test_metadata_of_another_kind_gives_our_own_error_or_a_model(one, tmp_path):
    keys = [
        key
        for key in gguf.GGUFReader(one).fields
        if not key.startswith(("GGUF.", "tokenizer.")) and key != "general.architecture"
    ]
    keys += ["llama.rope.scaling.factor", "llama.rope.scaling.type", "llama.expert_count",
             "llama.attention.sliding_window", "general.alignment"]  # fmt: skip
    for key in keys:
        for value, kind in WRONG:
            if key == "general.alignment" and kind == T.UINT32:
                continue  # the writer itself divides by it
            copy_with(one, tmp_path / "m.gguf", {key: (value, kind)})
            with contextlib.suppress(SurgeryError):
                open_model(tmp_path / "m.gguf")


VALUES = ["x" * 5000, -1, 0, 2**70, 1.5, float("nan"), float("inf"), [], [None], {}, {"a": 1}, True]


@pytest.mark.filterwarnings("ignore::nanogpt_surgery.SurgeryWarning")
@pytest.mark.parametrize("family", ["llama-scaled-tied", "gpt2", "qwen3"])
def test_config_values_of_another_kind_give_our_own_error_or_a_model(family, tmp_path):
    folder = saved(tmp_path / "m", family)
    path = folder / "config.json"
    good = json.loads(path.read_text())
    keys = [*good, "rope_scaling", "layer_types", "sliding_window", "use_sliding_window"]
    for key in keys:
        for value in VALUES:
            path.write_text(json.dumps(good | {key: value}))
            try:
                open_model(folder)
            except SurgeryError as error:
                assert len(error.what) < 3000, key


@pytest.mark.filterwarnings("ignore::nanogpt_surgery.SurgeryWarning")
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "generation_config.json"]
)
def test_mutated_json_gives_our_own_error_or_a_model(name, tmp_path):
    folder = saved(tmp_path / "m")
    if "index" in name:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        names = load_file(folder / "a.safetensors")
        (folder / name).write_text(
            json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")})
        )
    elif name.startswith("generation"):
        (folder / name).write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.5}))
    good, draw = (folder / name).read_bytes(), random.Random(0)
    for _ in range(150):
        data = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(data))
            data[place : place + draw.randint(0, 2)] = draw.choice(
                [b"", b"9", b"-", b"[", b'"', b"null", b"1e999", b"\xff", b"{}", b"true"]
            )
        (folder / name).write_bytes(data)
        with contextlib.suppress(SurgeryError):
            open_model(folder)
