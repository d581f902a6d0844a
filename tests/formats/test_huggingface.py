import dataclasses

import pytest
from helpers.models import CONFIGS, FAMILY_CONFIGS, OWN_CONFIGS, SCALING
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery import FAMILIES, GPTConfig, SurgeryError
from nanogpt_surgery.formats.huggingface.config import config_from_json, config_to_json, family_of

LLAMA = {
    "model_type": "llama",
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 19,
    "rms_norm_eps": 1e-5,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 53,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 19,
}


def to_json(config):
    return config_to_json(config, config.tie_head, "float32")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_comes_back_as_it_was(config):
    assert config_from_json(to_json(config)) == config


@pytest.mark.parametrize(("name", "config"), FAMILY_CONFIGS.items(), ids=FAMILY_CONFIGS)
def test_a_family_is_written_under_its_name(name, config):
    family = name.partition("-")[0]
    assert family_of(config) == family
    assert to_json(config)["model_type"] == family


@pytest.mark.parametrize("config", OWN_CONFIGS.values(), ids=OWN_CONFIGS)
def test_axes_that_no_family_has_get_a_model_type_of_our_own(config):
    assert family_of(config) == "nanogpt_surgery"
    assert to_json(config)["model_type"] == "nanogpt_surgery"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_that_a_family_allows_comes_back(family):
    for axis, values in FAMILIES[family].items():
        for value in values:
            config = GPTConfig.for_family(family, vocab_size=53, n_embd=24, **{axis: value})
            assert family_of(config) == family
            assert config_from_json(to_json(config)) == config


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_dropout_comes_back(config):
    config = dataclasses.replace(config, dropout=0.25)
    assert config_from_json(to_json(config)) == config


@pytest.mark.parametrize("changes", [{"n_kv_head": 1}, {"head_dim": 10}])
def test_sizes_that_gpt2_cannot_have_are_our_own(changes):
    config = dataclasses.replace(FAMILY_CONFIGS["gpt2"], **changes)
    assert family_of(config) == "nanogpt_surgery"


def test_whether_the_head_is_tied_is_written_as_it_is_said():
    config = FAMILY_CONFIGS["gpt2"]
    assert config_to_json(config, True, "float32")["tie_word_embeddings"] is True
    assert config_to_json(config, False, "bfloat16")["tie_word_embeddings"] is False
    assert config_to_json(config, False, "bfloat16")["dtype"] == "bfloat16"


ROPE_SCALING = dataclasses.asdict(SCALING)
ROPE_SPELLINGS = {
    "older": {
        "rope_theta": 300.0,
        "rope_scaling": {"rope_type": "llama3", **ROPE_SCALING},
    },
    "oldest": {"rope_theta": 300.0, "rope_scaling": {"type": "llama3", **ROPE_SCALING}},
    "both-names": {
        "rope_theta": 300.0,
        "rope_scaling": {"type": "llama3", "rope_type": "llama3", **ROPE_SCALING},
    },
    "newer": {"rope_parameters": {"rope_theta": 300.0, "rope_type": "llama3", **ROPE_SCALING}},
    "newer-with-null": {
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 300.0, "rope_type": "llama3", **ROPE_SCALING},
    },
    "theta-apart": {
        "rope_theta": 300.0,
        "rope_parameters": {"rope_type": "llama3", **ROPE_SCALING},
    },
}


@pytest.mark.parametrize("spelling", ROPE_SPELLINGS.values(), ids=ROPE_SPELLINGS)
def test_scaled_rotary_options_are_read_in_every_spelling(spelling):
    config = config_from_json(LLAMA | spelling)
    assert config.rope_theta == 300.0
    assert config.rope_scaling == SCALING


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 300.0},
        {"rope_theta": 300.0, "rope_scaling": None},
        {"rope_theta": 300.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 300.0}},
    ],
)
def test_plain_rotary_options_are_read_in_every_spelling(spelling):
    config = config_from_json(LLAMA | spelling)
    assert config.rope_theta == 300.0
    assert config.rope_scaling is None


def test_what_a_config_leaves_out_is_transformers_default():
    llama = config_from_json({k: v for k, v in LLAMA.items() if k != "rms_norm_eps"})
    assert (llama.norm_eps, llama.rope_theta, llama.tie_head) == (1e-6, 10000.0, False)
    assert (llama.n_kv_head, llama.head_dim, llama.bias) == (6, 4, "none")
    gpt2 = config_from_json(GPT2)
    assert (gpt2.norm_eps, gpt2.tie_head, gpt2.dropout) == (1e-5, True, 0.1)
    assert (gpt2.n_inner, gpt2.mlp) == (96, "gelu_tanh")
    assert config_from_json(LLAMA | {"model_type": "qwen3"}).head_dim == 128


def test_null_is_as_good_as_absent():
    nulls = {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None}
    assert config_from_json(LLAMA | nulls) == config_from_json(LLAMA)
    assert config_from_json(GPT2 | {"n_inner": None}) == config_from_json(GPT2)


REFUSED = [
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (LLAMA, {"pretraining_tp": 2}, "pretraining_tp 2"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias without attention_bias"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
    (LLAMA, {"rope_scaling": "linear"}, "rope_scaling 'linear'"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope full_attention"),
    (
        LLAMA,
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope partial_rotary_factor 0.5",
    ),
    (LLAMA, {"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window True"),
    (
        LLAMA,
        {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
        "sliding_attention",
    ),
    (GPT2, {"activation_function": "relu"}, "activation_function 'relu'"),
    (GPT2, {"scale_attn_weights": False}, "scale_attn_weights False"),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    (GPT2, {"add_cross_attention": True}, "add_cross_attention True"),
]


@pytest.mark.parametrize(("contents", "option", "fragment"), REFUSED, ids=lambda v: str(v)[:40])
def test_an_option_that_would_change_the_result_is_refused_by_name(contents, option, fragment):
    with pytest.raises(SurgeryError) as caught:
        config_from_json(contents | option)
    assert fragment in caught.value.what


def test_all_refused_options_are_named_at_once():
    with pytest.raises(SurgeryError) as caught:
        config_from_json(
            LLAMA | {"hidden_act": "relu", "pretraining_tp": 4, "rope_scaling": {"type": "yarn"}}
        )
    for fragment in ("hidden_act 'relu'", "pretraining_tp 4", "rope_type 'yarn'"):
        assert fragment in caught.value.what


NEEDED = [
    *((LLAMA, name) for name in LLAMA if name not in ("rms_norm_eps", "intermediate_size")),
    *((GPT2, name) for name in GPT2),
    *((to_json(OWN_CONFIGS["rotary-layernorm-gelu"]), name) for name in ("n_head", "norm")),
]


@pytest.mark.parametrize(("contents", "name"), NEEDED, ids=lambda v: v if type(v) is str else "")
def test_what_has_no_default_is_never_guessed(contents, name):
    with pytest.raises(SurgeryError, match=name):
        config_from_json({key: value for key, value in contents.items() if key != name})


def test_an_unknown_architecture_is_refused_with_the_families():
    with pytest.raises(SurgeryError, match="bert") as caught:
        config_from_json({"model_type": "bert"})
    assert all(name in caught.value.hint for name in ("gpt2", "llama", "mistral", "qwen2"))


def test_an_unknown_key_in_our_own_kind_is_refused_by_name():
    contents = to_json(OWN_CONFIGS["rotary-layernorm-gelu"]) | {"colour": "blue"}
    with pytest.raises(SurgeryError, match="colour"):
        config_from_json(contents)


def test_rotary_scaling_that_lacks_a_number_is_refused_by_name():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    with pytest.raises(SurgeryError, match="high_freq_factor"):
        config_from_json(LLAMA | {"rope_scaling": scaling})


WRITTEN = [to_json(config) for config in CONFIGS.values()]
STRANGE = st.sampled_from([None, "x", "", -1, 0, 3, 1.5, [], ["x"], {}, {"type": "x"}, True, False])


@given(data=st.data())
def test_a_damaged_config_gives_a_config_or_our_own_error(data):
    contents = dict(data.draw(st.sampled_from(WRITTEN)))
    keys = data.draw(st.lists(st.sampled_from(sorted(contents)), min_size=1, max_size=3))
    contents |= {key: data.draw(STRANGE) for key in keys}
    try:
        assert isinstance(config_from_json(contents), GPTConfig)
    except SurgeryError as error:
        assert str(error)


@pytest.mark.parametrize("contents", [[], "gpt2", None, 3])
def test_a_config_that_is_no_object_is_refused(contents):
    with pytest.raises(SurgeryError, match="model_type"):
        config_from_json(contents)
