"""Adapters made of adapters: against their definitions and PEFT's add_weighted_adapter."""

import math

import peft
import pytest
import torch
import transformers
from helpers.adapters import adapted, assert_same_bits, bits
from helpers.models import CONFIGS, random_ids, tiny_model, train_a_little
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanogpt_surgery import (
    SurgeryError,
    blend_lora,
    inject_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    save_model,
    swap_lora,
    undo_lora,
)
from nanogpt_surgery.history.model_history import history_of
from nanogpt_surgery.lora.several import active_adapters
from nanogpt_surgery.lora.stored_adapter import extract_adapter
from nanogpt_surgery.surgery import ablate, combine, combine_models, compress, extract
from nanogpt_surgery.surgery.low_rank import factorised, truncated


def two_adapters(name="llama"):
    """A model with two trained adapters of unequal ranks, on layers that overlap."""
    model = tiny_model(CONFIGS[name])
    inject_lora(model, ["q_proj", "down_proj"], rank=2, alpha=5, name="one")
    train_a_little(model, seed=1, size=0.3)
    inject_lora(model, ["q_proj", "v_proj"], rank=3, alpha=4, name="two")
    train_a_little(model, seed=2, size=0.3)
    return model


def deltas(model, name):
    return {p: u.delta_weight for p, u in extract_adapter(model, name).updates.items()}


def assert_close(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_a_linear_combination_is_the_blend(name):
    model = two_adapters(name)
    ids, weights = random_ids(model.config, 2, 7), {"one": 0.7, "two": -1.5}
    blend_lora(model, weights)
    blended = model(ids)
    report = combine(model, weights, "both", probe=ids)
    assert_close(model(ids), blended)
    assert report.summary["largest_layer_error"] == 0
    assert report.summary["largest_error"] < 1e-4
    ranks = {row["layer"].rpartition(".")[2]: row["rank"] for row in report.rows}
    assert ranks == {"q_proj": 5, "down_proj": 2, "v_proj": 3}


@torch.no_grad()
def test_it_is_undone_to_the_bit():
    model = two_adapters()
    before = bits(model)
    for operation in (
        lambda: combine(model, {"one": 1, "two": 1}, "c", method="ties"),
        lambda: compress(model, "one", "small", rank=1),
    ):
        operation()
        undo_lora(model)
        assert_same_bits(model, before)


@settings(max_examples=20, deadline=None)
@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_combining_is_linear(w1, w2, v1, v2):
    model = two_adapters()
    combine(model, {"one": w1, "two": w2}, "w")
    combine(model, {"one": v1, "two": v2}, "v")
    combine(model, {"w": 1, "v": 1}, "sum")
    combine(model, {"one": w1 + v1, "two": w2 + v2}, "at_once")
    one, other = deltas(model, "sum"), deltas(model, "at_once")
    for path in one:
        assert_close(one[path], other[path])


def theirs(ours, tmp_path, **options):
    """PEFT's combination of the same two adapters, on the same base: ΔW by layer."""
    folders = {}
    for name in ("one", "two"):
        folders[name] = tmp_path / name
        save_adapter(ours, folders[name], name=name)
    save_model(tiny_model(CONFIGS["llama"]), tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, folders["one"], adapter_name="one")
    model.load_adapter(folders["two"], adapter_name="two")
    model.add_weighted_adapter(["one", "two"], adapter_name="both", **options)
    layers = dict(model.named_modules())
    return {
        name.removeprefix("base_model.model.model."): layer.get_delta_weight("both")
        for name, layer in layers.items()
        if hasattr(layer, "lora_A") and "both" in layer.lora_A
    }


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft
@pytest.mark.parametrize(
    ("method", "rank", "their_options"),
    [
        ("linear", None, {"combination_type": "cat"}),
        ("linear", 2, {"combination_type": "svd", "svd_rank": 2}),
        ("ties", 4, {"combination_type": "ties_svd", "svd_rank": 4, "density": 0.3}),
    ],
)
@torch.no_grad()
def test_peft_combines_to_the_same(method, rank, their_options, tmp_path):
    model = tiny_model(CONFIGS["llama"])
    for seed, name in enumerate(("one", "two")):
        inject_lora(model, ["q_proj", "down_proj"], rank=2 + seed, alpha=4 + seed, name=name)
        train_a_little(model, seed=seed, size=0.3)
    expected = theirs(model, tmp_path, weights=[0.7, 1.5], **their_options)
    combine(model, {"one": 0.7, "two": 1.5}, "both", method=method, rank=rank, density=0.3)
    found = deltas(model, "both")
    assert found.keys() == expected.keys() != set()
    for path, delta in found.items():
        torch.testing.assert_close(delta, expected[path], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_slerp_keeps_to_the_arc():
    model = tiny_model(CONFIGS["llama"])
    for seed, name in enumerate(("one", "two")):
        inject_lora(model, "q_proj", rank=2, name=name)
        train_a_little(model, seed=seed, size=0.3)
    combine(model, {"one": 1, "two": 3}, "between", method="slerp")
    path = "layers.0.self_attn.q_proj"
    a, b, c = (deltas(model, name)[path].flatten() for name in ("one", "two", "between"))
    whole = torch.acos(torch.cosine_similarity(a, b, dim=0))
    if torch.isclose(a.norm(), b.norm(), rtol=1e-2):
        part = torch.acos(torch.cosine_similarity(a, c, dim=0))
        torch.testing.assert_close(part, 0.75 * whole, atol=1e-2, rtol=1e-2)
    shares = torch.sin(0.25 * whole) / torch.sin(whole), torch.sin(0.75 * whole) / torch.sin(whole)
    assert_close(c, shares[0] * a + shares[1] * b)


@torch.no_grad()
def test_dare_keeps_a_share_of_the_entries_and_the_mean():
    model = two_adapters()
    combine(model, {"one": 2.0}, "thinned", method="dare", density=0.5, seed=3, rank=40)
    path = "layers.0.mlp.down_proj"
    before, after = deltas(model, "one")[path], deltas(model, "thinned")[path]
    zeros = after.abs() < 1e-5
    assert 0.35 < float(zeros.float().mean()) < 0.65
    assert_close(after[~zeros], 4 * before[~zeros])  # the weight 2, over the density ½
    combine(model, {"one": 2.0}, "again", method="dare", density=0.5, seed=3, rank=40)
    assert torch.equal(deltas(model, "again")[path], after)


@torch.no_grad()
def test_compression_is_the_best_of_its_rank_and_says_its_error():
    model = two_adapters()
    ids = random_ids(model.config, 2, 7)
    report = compress(model, "two", "small", rank=1, probe=ids)
    full, small = deltas(model, "two"), deltas(model, "small")
    for row in report.rows:
        values = torch.linalg.svdvals(full[row["layer"]].double())
        best = float((values[1:].square().sum() / values.square().sum()).sqrt())
        assert row["error"] == pytest.approx(best, rel=1e-3)
        gap = (full[row["layer"]] - small[row["layer"]]).norm() / full[row["layer"]].norm()
        assert row["error"] == pytest.approx(float(gap), rel=1e-3)
    assert report.summary["kl"] > 0
    report = compress(model, "two", "most", energy=0.9)
    assert all(row["error"] ** 2 <= 0.1 for row in report.rows)
    assert {row["rank"] for row in report.rows} <= {1, 2, 3}


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-scaled-tied", "gpt2-gelu-untied"])
@torch.no_grad()
def test_an_adapter_that_was_merged_is_extracted_again(name):
    tuned = adapted(CONFIGS[name], [r".*_proj"], rank=3)
    ids = random_ids(tuned.config, 2, 7)
    expected = deltas(tuned, "default")
    merge_lora(tuned)
    model = tiny_model(CONFIGS[name])
    before = bits(model)
    report = extract(model, tuned, "back", energy=0.99999, probe=ids)
    assert report.summary["kl"] < 1e-6
    found = deltas(model, "back")
    assert found.keys() == expected.keys()
    for path, delta in found.items():
        torch.testing.assert_close(delta, expected[path], atol=1e-3, rtol=1e-3)
    undo_lora(model)
    assert_same_bits(model, before)


@torch.no_grad()
def test_a_tied_embedding_is_extracted_for_both():
    model, tuned = (tiny_model(CONFIGS["llama-scaled-tied"]) for _ in range(2))
    ids = random_ids(model.config, 2, 7)
    tuned.embed_tokens.weight[3] += 1
    tuned.norm.weight += 0.5
    report = extract(model, tuned, "both", rank=2)
    assert report.summary["left out"] == ""
    assert report.rows[-1] == {"layer": "norm.weight", "rank": None, "error": 0.0} | {
        "‖ΔW‖": pytest.approx(0.5 * 24**0.5)
    }
    assert_close(model(ids), tuned(ids))


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to True but the target module is",
)  # peft
@torch.no_grad()
def test_biases_and_norms_are_extracted_and_peft_computes_the_tuned_model(tmp_path):
    model, tuned = (tiny_model(CONFIGS["gpt2"]) for _ in range(2))
    save_model(model, tmp_path / "base")
    ids = random_ids(model.config, 2, 7)
    tuned.layers[0].mlp.up_proj.weight += 0.1
    tuned.layers[0].mlp.up_proj.bias += torch.arange(40) / 50
    tuned.layers[1].self_attn.k_proj.bias -= 0.7  # its weight is as it was
    tuned.layers[1].input_layernorm.weight *= 2
    tuned.norm.bias += 0.3
    report = extract(model, tuned, "all", rank=1, probe=ids)
    assert report.summary["largest_error"] < 1e-4
    assert (report.summary["biases"], report.summary["left out"]) == (2, "")
    whole = [row["layer"] for row in report.rows if row["rank"] is None]
    moved = "layers.1.self_attn.k_proj.bias"
    assert whole == [moved, "layers.1.input_layernorm.weight", "norm.bias"]
    assert report.summary["layers"] == 2
    assert report.rows[1]["‖ΔW‖"] == pytest.approx(0.7 * 24**0.5, rel=1e-5)
    save_adapter(model, tmp_path / "all")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "all").eval()
    torch.testing.assert_close(theirs(ids).logits, tuned(ids), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_biases_that_the_format_has_no_place_for_are_named_with_their_size():
    model, tuned = (tiny_model(CONFIGS["gpt2"]) for _ in range(2))
    ids = random_ids(model.config, 2, 7)
    tuned.embed_tokens.weight[3] += 1
    tuned.layers[0].self_attn.o_proj.bias += torch.arange(24) / 9
    report = extract(model, tuned, "all", rank=1, probe=ids)
    assert report.summary["left out"] == "layers.0.self_attn.o_proj.bias (24)"
    assert report.summary["largest_error"] > 0.01


@torch.no_grad()
def test_a_combination_opens_elsewhere_as_an_adapter(tmp_path):
    model = two_adapters()
    ids = random_ids(model.config, 2, 7)
    combine(model, {"one": 1, "two": 0.5}, "both")
    expected = model(ids)
    save_adapter(model, tmp_path / "both", name="both")
    bare = tiny_model(CONFIGS["llama"])
    load_adapter(bare, tmp_path / "both")
    assert_close(bare(ids), expected)


def test_what_cannot_be_is_refused_and_changes_nothing():
    model = two_adapters()
    swap_lora(model, "one")
    before = bits(model)
    wrong = [
        ({"one": 1, "three": 1}, {}, "three"),
        ({"one": math.nan}, {}, "nan"),
        ({}, {}, "^0 "),
        ({"one": 1}, {"method": "slerp"}, r"^1 .*2"),
        ({"one": 1, "two": -1}, {"method": "slerp"}, "add up to 0"),
        ({"one": 1}, {"density": 0.0}, r"0\.0"),
        ({"one": 1}, {"rank": 0}, "0"),
    ]
    for weights, options, said in wrong:
        with pytest.raises(SurgeryError, match=said):
            combine(model, weights, "c", **options)
    with pytest.raises(SurgeryError, match="two"):
        combine(model, {"one": 1}, "two")
    with pytest.raises(SurgeryError, match="energy"):
        compress(model, "one", "c")
    with pytest.raises(SurgeryError, match=r"8.*0\.5"):
        compress(model, "one", "c", rank=8, energy=0.5)
    with pytest.raises(SurgeryError, match=r"\(53, 24\).*\(7, 24\)"):
        extract(*(nn.ModuleDict({"e": nn.Embedding(n, 24)}) for n in (53, 7)), "c", rank=1)
    same = tiny_model(CONFIGS["gpt2"])
    with pytest.raises(SurgeryError, match="do not differ"):
        extract(same, tiny_model(CONFIGS["gpt2"]), "c", rank=1)
    assert_same_bits(model, before)


def test_dora_is_no_product():
    model = tiny_model(CONFIGS["llama"])
    inject_lora(model, "q_proj", dora=True, name="d")
    with pytest.raises(SurgeryError, match=r"'d'.*DoRA.*q_proj"):
        combine(model, {"d": 1}, "c")


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncation_is_the_best_of_its_rank(rank):
    draw = torch.Generator().manual_seed(rank)
    a, b = torch.randn(6, 11, generator=draw), torch.randn(17, 6, generator=draw)
    small_a, small_b = truncated((a, b), rank, None)
    dense_a, dense_b = factorised(b @ a, rank, None)
    assert small_a.shape == (rank, 11)
    assert_close(small_b @ small_a, dense_b @ dense_a)
    best = torch.linalg.svdvals(b @ a)[rank:].norm()
    torch.testing.assert_close((b @ a - small_b @ small_a).norm(), best, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("targets", ["lm_head", ["embed_tokens", "q_proj"]])
@torch.no_grad()
def test_adapters_that_keep_a_tie_are_combined_and_compressed_to_one_that_does(targets):
    model = tiny_model(CONFIGS["llama-scaled-tied"])
    ids = random_ids(model.config, 2, 7)
    for seed, name in enumerate(("one", "two")):
        inject_lora(model, targets, rank=2 + seed, alpha=5, name=name, tied="both")
        train_a_little(model, seed=seed, size=0.3)
    weights = {"one": 0.7, "two": -1.5}
    blend_lora(model, weights)
    expected = model(ids)
    combine(model, weights, "sum")
    assert_close(model(ids), expected)
    for method in ("linear", "ties", "dare"):
        combine(model, weights, method, method=method, rank=2)
    compress(model, "sum", "small", rank=1)
    for name in ("sum", "linear", "ties", "dare", "small"):
        changes = deltas(model, name)
        assert torch.equal(changes["embed_tokens"].T, changes["lm_head"])


@torch.no_grad()
def test_one_adapter_that_unties_unties_the_combination():
    model = tiny_model(CONFIGS["llama-scaled-tied"])
    ids = random_ids(model.config, 2, 7)
    for seed, (name, tied) in enumerate((("one", "both"), ("two", "untie"))):
        inject_lora(model, "lm_head", rank=2, name=name, tied=tied)
        train_a_little(model, seed=seed, size=0.3)
    blend_lora(model, {"one": 1, "two": 2})
    expected = model(ids)
    combine(model, {"one": 1, "two": 2}, "sum")
    assert_close(model(ids), expected)


@pytest.mark.parametrize("moved", [("lm_head",), ("embed_tokens", "lm_head"), ("embed_tokens",)])
@torch.no_grad()
def test_a_model_that_was_untied_is_extracted_from_its_tied_base(moved):
    model, tuned = (tiny_model(CONFIGS["llama-scaled-tied"]) for _ in range(2))
    ids = random_ids(model.config, 2, 7)
    tuned.lm_head.weight = nn.Parameter(tuned.lm_head.weight.clone())
    for row, name in enumerate(moved):
        tuned.get_submodule(name).weight[row] += 1
    report = extract(model, tuned, "own", rank=2)
    assert [row["layer"] for row in report.rows] == sorted(moved)
    assert_close(model(ids), tuned(ids))
    merge_lora(model)
    assert_close(model(ids), tuned(ids))


@torch.no_grad()
def test_what_is_not_finite_is_named():
    model, tuned = two_adapters(), tiny_model(CONFIGS["llama"])
    layer = "layers.1.self_attn.q_proj"
    tuned.get_submodule(layer).weight[0, 0] = math.nan
    with pytest.raises(SurgeryError, match=layer):
        extract(tiny_model(CONFIGS["llama"]), tuned, "c", rank=1)
    normed = tiny_model(CONFIGS["llama"])
    normed.norm.weight[0] = math.nan
    with pytest.raises(SurgeryError, match=r"norm\.weight"):
        extract(tiny_model(CONFIGS["llama"]), normed, "c", rank=1)
    model.get_submodule(layer).updates["two"].lora_B[0, 0] = math.inf
    before = bits(model)
    for method in ("linear", "slerp", "ties", "dare"):
        with pytest.raises(SurgeryError, match=rf"{layer} by 'two'"):
            combine(model, {"one": 1, "two": 1}, "c", method=method)
    with pytest.raises(SurgeryError, match=rf"{layer} by 'two'"):
        compress(model, "two", "c", rank=1)
    assert_same_bits(model, before)


def test_an_adapter_minus_itself_has_no_error():
    model = two_adapters()
    combine(model, {"one": 1}, "copy")
    report = combine(model, {"one": 1, "copy": -1}, "nothing", rank=2)
    assert report.summary["largest_layer_error"] == 0
    assert max(delta.abs().max() for delta in deltas(model, "nothing").values()) < 1e-5


@torch.no_grad()
def test_rounding_is_no_difference_between_dtypes():
    base = tiny_model(CONFIGS["llama"])
    base.to(torch.bfloat16)
    tuned = tiny_model(CONFIGS["llama"])
    tuned.layers[1].mlp.up_proj.weight += 0.1
    report = extract(base, tuned, "back", rank=2)
    assert [row["layer"] for row in report.rows] == ["layers.1.mlp.up_proj"]
    assert report.summary["left out"] == ""
    with pytest.raises(SurgeryError, match="do not differ"):
        extract(tiny_model(CONFIGS["llama"]), tiny_model(CONFIGS["llama"]).bfloat16(), "x", rank=1)


@pytest.mark.parametrize("kind", ["combine", "compress", "extract", "ablate", "models"])
def test_a_probe_that_fails_the_second_time_leaves_nothing_done(kind):
    model, calls = two_adapters(), []
    if kind in ("extract", "models"):
        model = tiny_model(CONFIGS["llama"])
    ids = random_ids(model.config, 1, 4)

    def probe():
        calls.append(1)
        if len(calls) == 2:
            raise SurgeryError("the second call")
        return model(ids)

    other = tiny_model(CONFIGS["llama"], seed=3)
    operations = {
        "combine": lambda: combine(model, {"one": 1, "two": 1}, "c", probe=probe),
        "compress": lambda: compress(model, "one", "c", rank=1, probe=probe),
        "extract": lambda: extract(model, other, "c", rank=1, probe=probe),
        "ablate": lambda: ablate(model, "c", heads={0: [1]}, probe=probe),
        "models": lambda: combine_models(model, {"o": other}, {"o": 1.0}, probe=probe),
    }
    before, active = bits(model), str(active_adapters(model))
    done = len(history_of(model).operations)
    with pytest.raises(SurgeryError, match="second"):
        operations[kind]()
    assert len(calls) == 2
    assert_same_bits(model, before)
    assert str(active_adapters(model)) == active
    assert len(history_of(model).operations) == done


def test_bad_ids_in_a_probe_are_refused_with_the_numbers():
    model = two_adapters()
    before = bits(model)
    for probe, said in (
        (torch.tensor([[53]]), r"53.*0 to 52"),
        (torch.tensor([1, 2]), r"\(2,\)"),
        (torch.rand(1, 2), "float32"),
    ):
        for work in (merge_lora, lambda m, probe: compress(m, "one", "c", rank=1, probe=probe)):
            with pytest.raises(SurgeryError, match=said):
                work(model, probe=probe)
    assert_same_bits(model, before)
