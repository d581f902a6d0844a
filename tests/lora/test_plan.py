import pytest
from helpers.builds import MODELS
from helpers.models import FAMILY_CONFIGS, tiny_model
from safetensors.torch import load_file
from torch import nn

from nanogpt_surgery import (
    GPTConfig,
    SimpleGPT,
    SurgeryError,
    inject_lora,
    load_adapter,
    lora_log,
    plan_lora,
    save_adapter,
    tensor_hashes,
)
from nanogpt_surgery.lora.several import has_lora


@pytest.mark.parametrize("patient", MODELS)
@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"pissa": True, "rank_pattern": {"0": 1}}])
def test_the_plan_is_what_the_injection_does(patient, kind):
    kind = kind if patient == "another" else {k: v for k, v in kind.items() if k != "rank_pattern"}
    model = MODELS[patient]()
    targets = ["all-linear", r".*embed_tokens|table"]
    if kind.get("rank_pattern"):
        kind["rank_pattern"] = {r"body\.0": 1}
    before = tensor_hashes(model)
    plan = plan_lora(model, targets, rank=3, **kind)
    assert tensor_hashes(model) == before
    assert not has_lora(model)
    assert not lora_log(model).rows
    done = inject_lora(model, targets, rank=3, **kind)
    for key in ("layers", "trainable_parameters"):
        assert plan.summary[key] == done.summary[key]
    assert [row["layer"] for row in plan.rows] == [row["layer"] for row in done.rows]
    assert [row["parameters"] for row in plan.rows] == [row["parameters"] for row in done.rows]
    assert {row["pattern"] for row in plan.rows} == set(targets)


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"pissa": True}])
def test_the_adapter_s_size_on_disk_is_foreseen(kind, tmp_path):
    model = MODELS["transformers"]()
    plan = plan_lora(model, ["all-linear", "embed_tokens"], rank=6, **kind)
    inject_lora(model, ["all-linear", "embed_tokens"], rank=6, **kind)
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert plan.summary["adapter_bytes"] == file.stat().st_size
    numbers = sum(tensor.numel() for tensor in load_file(file).values())
    assert sum(row["bytes"] for row in plan.rows) == 4 * numbers


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        (["q_proj"], {}),
        (["q_proj", "v_proj", "down_proj"], {"dora": True}),
        (["all-linear", "embed_tokens"], {"pissa": True, "tied": "untie"}),
    ],
)
def test_so_is_that_of_a_family_s_file(family, targets, kind, tmp_path):
    """GPT-2's fuses q, k and v: one B for all of them, with zeros between theirs."""
    model = tiny_model(FAMILY_CONFIGS[family])
    plan = plan_lora(model, targets, rank=3, **kind)
    inject_lora(model, targets, rank=3, **kind)
    save_adapter(model, tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert plan.summary["adapter_bytes"] == size


def test_a_plan_is_refused_as_the_injection_would_be():
    model = MODELS["SimpleGPT"](tied=True)
    with pytest.raises(SurgeryError, match="nearest"):
        plan_lora(model, "q_prj")
    with pytest.raises(SurgeryError, match="lm_head with embed_tokens"):
        plan_lora(model, "lm_head")
    [row] = plan_lora(model, "lm_head", tied="both").rows
    assert row["tied to"] == "embed_tokens"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.MultiheadAttention(4, 2), "out_proj.*past its forward"),
        (nn.TransformerEncoderLayer(4, 2, 8), "linear1.*past its forward"),
    ],
)
def test_what_would_not_see_a_lora_is_refused(module, reason):
    model = nn.Sequential(module)
    with pytest.raises(SurgeryError, match=reason):
        plan_lora(model, ["0.out_proj" if "out" in reason else "linear1"])


def test_a_conv1d_is_refused_with_the_way_out(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8))
    for targets in ("c_attn", "all-linear"):
        with pytest.raises(SurgeryError, match=r"Conv1D.*open_model.*q_proj"):
            plan_lora(model, targets)
    ours = SimpleGPT.from_config(
        GPTConfig.for_family("gpt2", vocab_size=11, n_embd=8, n_head=2, n_layer=1, block_size=8)
    )
    inject_lora(ours, "q_proj")
    save_adapter(ours, tmp_path / "adapter")
    with pytest.raises(SurgeryError, match=r"c_attn' \(it is a Conv1D.*open_model"):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"targets": "q_proj", "rank": 25, "pissa": True}, r"only 24 directions"),
        ({"targets": "lm_head", "dora": True, "tied": "both"}, "plain LoRA and rsLoRA"),
        ({"targets": "lm_head", "pissa": True, "tied": "both"}, "plain LoRA and rsLoRA"),
        ({"targets": "q_proj", "rank_pattern": {"*.q_proj": 4}}, r"'\*\.q_proj' of rank_pattern"),
        ({"targets": "q_proj", "alpha_pattern": {"(": 4}}, r"'\(' of .*not a regular expression"),
    ],
)
@pytest.mark.parametrize("verb", [plan_lora, inject_lora])
def test_a_plan_promises_nothing_that_the_injection_refuses(verb, wrong, reason):
    model = MODELS["SimpleGPT"](tied=True)
    with pytest.raises(SurgeryError, match=reason) as caught:
        verb(model, **wrong)
    assert caught.value.hint
    assert not has_lora(model)
