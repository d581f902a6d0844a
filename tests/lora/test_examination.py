import pytest
import torch
from helpers.adapters import attach_adapter
from helpers.builds import MODELS, logits, some_ids
from helpers.models import train_a_little
from torch import nn

from nanogpt_surgery import (
    LoRALinear,
    SurgeryError,
    inject_lora,
    merge_lora,
    merge_survival,
    tensor_hashes,
)
from nanogpt_surgery.history.model_history import tensor_hash
from nanogpt_surgery.lora.merging import (
    add_update,
    compare_logits,
    logits_of,
    round_int4,
    round_int8,
)
from nanogpt_surgery.lora.several import has_lora, lora_layers
from nanogpt_surgery.lora.stored_adapter import StoredAdapter


def adapted(dtype: torch.dtype = torch.float32, size: float = 0.1) -> nn.Module:
    model = MODELS["SimpleGPT"]().to(dtype)
    inject_lora(model, "all-linear", rank=2)
    train_a_little(model, size=size)
    return model


def test_a_merge_reports_its_effect_on_the_probe():
    model, ids = adapted(), some_ids()
    before = logits(model, ids)
    report = merge_lora(model, probe=ids)
    after = logits(model, ids)
    assert report.summary["largest_error"] == float((after - before).abs().max())
    assert report.summary["mean_error"] == float((after - before).abs().mean())
    assert 0 <= report.summary["kl"] < 1e-9
    assert report.summary["top_token_unchanged"] == 1


def test_the_four_measures_of_two_sets_of_logits():
    one, other = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    effect = compare_logits(one, other)
    p, q = (
        torch.distributions.Categorical(logits=one),
        torch.distributions.Categorical(logits=other),
    )
    kl = torch.distributions.kl_divergence(p, q).mean()
    assert effect["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert effect["top_token_unchanged"] == pytest.approx(
        float((one.argmax(-1) == other.argmax(-1)).float().mean())
    )


def test_a_merge_over_the_tolerance_is_refused_and_force_overrides():
    model, ids = adapted(torch.bfloat16), some_ids()
    hashes = tensor_hashes(model)
    with pytest.raises(SurgeryError, match=r"nats a token away \(tolerance 1e-12\)") as caught:
        merge_lora(model, probe=ids, tolerance=1e-12)
    assert "force=True" in caught.value.hint
    assert tensor_hashes(model) == hashes
    assert has_lora(model)
    report = merge_lora(model, probe=ids, tolerance=1e-12, force=True)
    assert report.summary["kl"] > 1e-12
    assert not has_lora(model)


def test_a_merge_that_gives_no_numbers_is_refused():
    model = adapted()
    for layer in lora_layers(model).values():
        layer.lora_B.data.fill_(1e15)
        layer.lora_A.data.fill_(1e15)
    with pytest.raises(SurgeryError, match=r"tolerance 0\.001"):
        merge_lora(model, probe=some_ids())
    assert has_lora(model)


def test_the_probe_may_be_a_function():
    model, ids = adapted(), some_ids()
    report = merge_lora(model, probe=lambda: model(ids)[:, -1])
    assert report.summary["top_token_unchanged"] == 1


def test_the_probe_changes_no_mode_and_keeps_no_gradient():
    model = adapted().train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    out = logits_of(model, some_ids())
    assert [module.training for module in model.modules()] == modes
    assert not out.requires_grad


def test_an_adapter_of_large_changes_survives_and_one_of_tiny_changes_does_not():
    report = merge_survival(adapted(size=0.5))
    for row in report.rows:
        assert row["float16"] > 0.99
        assert row["int8"] > 0.9
    tiny = merge_survival(adapted(size=1e-4))
    assert tiny.summary["lowest_int4"] == 0
    assert tiny.summary["lowest_bfloat16"] < 0.5
    assert "layers.0.self_attn.q_proj" in str(tiny)


def survival_of(weight: torch.Tensor, delta: torch.Tensor) -> dict[str, float]:
    """The report's row for one layer with a known W and a known ΔW of rank 1."""
    linear = nn.Linear(weight.size(1), weight.size(0), bias=False)
    linear.weight.data = weight
    layer = LoRALinear(linear, rank=1, alpha=1)
    u, s, vh = torch.linalg.svd(delta)
    layer.lora_A.data, layer.lora_B.data = vh[:1], u[:, :1] * s[0]
    [row] = merge_survival(nn.Sequential(layer)).rows
    return row


def test_changes_below_half_a_step_are_gone_and_whole_steps_arrive():
    weight = torch.full((4, 32), 127.0)  # an int8 step is 1, an int4 step 127 / 7
    lost = survival_of(weight, torch.full((4, 32), -0.2))
    kept = survival_of(weight.clone(), torch.outer(torch.ones(4), torch.arange(32) == 3) * -1.0)
    assert lost["bfloat16"] == 0  # between 64 and 128 a bfloat16 step is a half
    assert lost["float16"] > 0.9
    assert kept["int8"] == pytest.approx(1, abs=1e-5)
    assert kept["int4"] == 0


def test_rounding_to_integers_has_as_many_levels_as_it_says():
    weight = torch.randn(3, 70)
    for row, rounded in zip(weight, round_int8(weight), strict=True):
        assert len(rounded.unique()) <= 255
        assert (rounded - row).abs().max() <= row.abs().max() / 127 / 2 * 1.001
    rounded = round_int4(weight)
    assert rounded.shape == weight.shape
    for block, was in zip(rounded[:, 32:64], weight[:, 32:64], strict=True):
        assert len(block.unique()) <= 15
        assert (block - was).abs().max() <= was.abs().max() / 7 / 2 * 1.001


@pytest.mark.parametrize(("arriving", "kept"), [(1, 1), (0, 0), (0.5, 0.75), (-1, 0)])
def test_the_change_kept_is_a_share(arriving, kept):
    layer = LoRALinear(nn.Linear(5, 6), rank=2)
    nn.init.zeros_(layer.original_layer.weight)
    nn.init.normal_(layer.lora_B)
    _, row = add_update(layer, stored=("a share", lambda numbers: arriving * numbers))
    assert row["change kept"] == pytest.approx(kept, abs=1e-12)


def test_a_hash_knows_dtype_shape_and_every_bit():
    tensor = torch.zeros(2, 3)
    others = [tensor.t(), tensor.half(), tensor.int(), torch.zeros(6), -tensor]
    assert len({tensor_hash(t) for t in [tensor, *others]}) == 6
    assert tensor_hash(tensor) == tensor_hash(tensor.t().contiguous().t())
    assert tensor_hash(torch.tensor(1.5, dtype=torch.bfloat16))


def test_a_merge_in_bfloat16_rounds_once_and_says_what_is_lost():
    model = adapted(torch.bfloat16, size=0.02)
    layer = lora_layers(model)["layers.0.mlp.up_proj"]
    weight = layer.original_layer.weight
    wanted = (weight.float() + layer.delta_weight()).bfloat16()
    report = merge_lora(model)
    assert torch.equal(model.get_submodule("layers.0.mlp.up_proj").weight, wanted)
    [row] = [row for row in report.rows if row["layer"] == "layers.0.mlp.up_proj"]
    assert row["dtype"] == "bfloat16"
    assert 0 < row["change kept"] < 1


@pytest.mark.parametrize(
    ("dtype", "size", "hint"),
    [
        (torch.float32, float("nan"), "train the adapter first"),
        (torch.float32, 1e30, "train the adapter first"),
        (torch.float16, 300.0, "merge into float32 weights"),
    ],
)
def test_a_merge_that_makes_nan_or_infinite_weights_is_refused_without_a_probe(dtype, size, hint):
    model = adapted(dtype)
    update = lora_layers(model)["layers.1.mlp.up_proj"].update
    update.lora_A.data[:, 0], update.lora_B.data[0] = size, size
    hashes = tensor_hashes(model)
    with pytest.raises(SurgeryError, match=r"in 1 layers \(layers\.1\.mlp\.up_proj\)") as caught:
        merge_lora(model)
    assert hint in caught.value.hint
    assert ("bfloat16" in str(caught.value)) == (dtype == torch.float16)
    assert tensor_hashes(model) == hashes
    merge_lora(model, force=True)
    assert not has_lora(model)


def test_a_copy_of_a_module_with_a_nan_is_not_merged():
    model = MODELS["SimpleGPT"]()
    attach_adapter(model, StoredAdapter({}, whole={"norm.weight": torch.full((24,), float("nan"))}))
    with pytest.raises(SurgeryError, match=r"NaN or infinite in 1 layers \(norm\)"):
        merge_lora(model)
    assert has_lora(model)


def test_a_merge_in_float64_keeps_its_bits():
    model = MODELS["SimpleGPT"]().double()
    for parameter in model.parameters():
        parameter.data += 1e-10
    inject_lora(model, "up_proj", rank=2)
    train_a_little(model)
    layer = lora_layers(model)["layers.0.mlp.up_proj"]
    layer.lora_B.data[3:] = 0
    weight, wanted = layer.original_layer.weight, layer.original_layer.weight + layer.delta_weight()
    report = merge_lora(model)
    merged = model.layers[0].mlp.up_proj.weight
    assert torch.equal(merged, wanted)
    assert torch.equal(merged[3:], weight[3:])
    assert report.rows[0]["dtype"] == "float64"
    assert report.rows[0]["largest error"] == 0
    assert report.rows[0]["weights changed"] < 0.1
