"""What was ablated is gone, and nothing else is touched."""

import pytest
import torch
from helpers.adapters import adapted, assert_same_bits, bits
from helpers.models import CONFIGS, random_ids, tiny_model

from nanogpt_surgery import (
    GPTConfig,
    SurgeryError,
    blend_lora,
    disable_lora,
    inject_lora,
    load_adapter,
    merge_lora,
    open_model,
    redo_lora,
    save_adapter,
    save_model,
    undo_lora,
)
from nanogpt_surgery.interpret import patch, project_out, record, zero
from nanogpt_surgery.lora.several import adapter_names
from nanogpt_surgery.surgery import ablate, extract


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny_model(CONFIGS[request.param])


@torch.no_grad()
def test_heads_and_neurons_add_nothing_any_more(model):
    ids = random_ids(model.config, 2, 7)
    neurons = {"layers.0.neurons": zero()}
    with patch(model, {"layers.1.heads": zero(heads=[0, 2]), **neurons}):
        expected = model(ids)
    before, plain = bits(model), model(ids)
    everything = range(model.config.n_inner)
    report = ablate(model, heads={1: [2, 0]}, neurons={0: everything}, probe=ids)
    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
    assert [row["layer"] for row in report.rows] == [
        "layers.0.mlp.down_proj",
        "layers.1.self_attn.o_proj",
    ]
    assert all(row["left"] <= 1e-6 for row in report.rows)
    assert report.rows[1]["rank"] == 2 * model.config.head_dim
    assert report.summary["kl"] > 0
    with record(model, "layers.1.heads") as found:
        model(ids)
    shares = found["layers.1.heads"]
    size = shares.norm()
    assert shares[:, :, [0, 2]].norm() < 1e-5 * size
    disable_lora(model)
    assert torch.equal(model(ids), plain)
    undo_lora(model)
    undo_lora(model)
    assert_same_bits(model, before)


@torch.no_grad()
def test_no_block_writes_along_the_direction_any_more(model, tmp_path):
    ids, direction = random_ids(model.config, 2, 7), torch.randn(model.config.n_embd)
    report = ablate(model, direction=3 * direction)
    unit = direction / direction.norm()
    cut = model(ids)
    with record(model, ["layers.*.self_attn", "layers.*.mlp"]) as found:
        model(ids)
    for row in report.rows:
        path = row["layer"].rpartition(".")[0]
        assert (found[path] @ unit).abs().max() <= 1e-6 * found[path].norm()
        layer = model.get_submodule(row["layer"]).original_layer
        bias = 0.0 if layer.bias is None else float(layer.bias @ unit)
        assert row["bias along it"] == pytest.approx(bias, abs=1e-6)
    expected = (model.embed_tokens.weight @ unit).square().mean().sqrt()
    assert report.summary["embedding along it"] == pytest.approx(float(expected), rel=1e-4)
    save_adapter(model, tmp_path / "cut")
    again = tiny_model(model.config)
    load_adapter(again, tmp_path / "cut")
    assert torch.equal(again(ids), cut)
    merge_lora(model)
    torch.testing.assert_close(model(ids), cut, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_direction_and_heads_are_cut_together():
    model = tiny_model(CONFIGS["llama"])
    ids, direction = random_ids(model.config, 2, 7), torch.randn(24)
    cuts = {"layers.1.heads": zero(heads=[3])}
    cuts |= {f"layers.1.{half}": project_out(direction) for half in ("self_attn", "mlp")}
    with patch(model, cuts):
        expected = model(ids)
    ablate(model, heads={1: [3]}, direction=direction, layers=[1])
    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_ablation_is_an_adapter_like_any_other(tmp_path):
    model = tiny_model(CONFIGS["llama"])
    ids = random_ids(model.config, 2, 7)
    plain = model(ids)
    ablate(model, "cut", heads={0: [1]})
    cut = model(ids)
    save_adapter(model, tmp_path / "cut")
    blend_lora(model, {"cut": 0.0})
    torch.testing.assert_close(model(ids), plain)
    blend_lora(model, {"cut": 1.0})
    merge_lora(model)
    torch.testing.assert_close(model(ids), cut, atol=1e-5, rtol=1e-5)
    bare = tiny_model(CONFIGS["llama"])
    load_adapter(bare, tmp_path / "cut")
    torch.testing.assert_close(bare(ids), cut)


def test_what_is_not_there_is_named():
    model = tiny_model(CONFIGS["llama"])
    before = bits(model)
    wrong = [
        ({"heads": {0: [6]}}, r"head 6.*0 to 5"),
        ({"heads": {2: [0]}}, r"layer 2.*0 to 1"),
        ({"neurons": {0: [-1]}}, r"neuron -1.*0 to 27"),
        ({"direction": torch.ones(7)}, r"\(7,\).*\(24,\)"),
        ({"direction": torch.zeros(24)}, r"0\.0"),
        ({"direction": torch.ones(24), "layers": [5]}, r"layer 5"),
        ({}, "nothing"),
        ({"heads": {0: []}}, "nothing"),
        ({"heads": {0: 1}}, r"1.*heads"),
        ({"heads": {0: [1.5]}}, r"1\.5.*heads"),
        ({"neurons": {0: [1.5]}}, r"1\.5.*neurons"),
        ({"heads": {"0": [1]}}, r"'0'.*layers"),
        ({"heads": {0: [1]}, "layers": [1]}, "without a direction"),
        ({"direction": torch.full((24,), torch.nan)}, "nan"),
        ({"heads": {0: [1]}, "probe": torch.tensor([[53]])}, r"53.*0 to 52"),
        ({"direction": torch.full((24,), torch.inf)}, "inf"),
    ]
    for options, said in wrong:
        with pytest.raises(SurgeryError, match=said):
            ablate(model, **options)
    assert_same_bits(model, before)


@torch.no_grad()
def test_numbers_may_be_an_array_and_named_twice():
    model, other = tiny_model(CONFIGS["llama"]), tiny_model(CONFIGS["llama"])
    ids = random_ids(model.config, 1, 5)
    ablate(model, neurons={0: torch.tensor([3, 1, 3])}, heads={1: torch.tensor([2])})
    ablate(other, neurons={0: [1, 3]}, heads={1: [2]})
    assert torch.equal(model(ids), other(ids))


@torch.no_grad()
def test_the_effect_is_that_of_the_ablation_alone():
    """An adapter that waits from then on is no part of it."""
    model, bare = adapted(CONFIGS["llama"]), tiny_model(CONFIGS["llama"])
    ids = random_ids(model.config, 1, 5)
    reports = [ablate(m, "cut", heads={0: [1]}, probe=ids) for m in (model, bare)]
    assert reports[0].summary == reports[1].summary


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_quantised_model_is_ablated_and_not_extracted(tied, tmp_path):
    config = GPTConfig(53, n_embd=32, n_head=2, n_layer=2, block_size=19, tie_head=tied)
    save_model(tiny_model(config), tmp_path / "m")
    model, _ = open_model(tmp_path / "m", quantize="int8")
    ids = random_ids(config, 2, 7)
    with patch(model, {"layers.1.heads": zero(heads=[0])}):
        expected = model(ids)
    with pytest.raises(SurgeryError, match=r"quantised.*extract"):
        extract(model, tiny_model(config), "x", rank=1)
    ablate(model, heads={1: [0]}, probe=ids)
    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("waiting", ["o_proj", "down_proj", "q_proj"])
def test_a_merged_ablation_is_undone_where_an_adapter_waits_on_the_same_layer(waiting):
    model = tiny_model(CONFIGS["llama"])
    inject_lora(model, [waiting], rank=2, name="w")
    before, direction = bits(model), torch.randn(model.config.n_embd)
    for _ in range(2):
        ablate(model, "x", heads={0: [1]}, direction=direction, merge=True)
        after = bits(model)
        report = undo_lora(model)
        assert report.summary["not_there_before_the_operation"] == 0
        assert adapter_names(model) == ["w"]
        assert_same_bits(model, before)
        redo_lora(model)
        assert_same_bits(model, after)
        undo_lora(model)


def test_a_merged_ablation_that_fails_leaves_the_adapter_that_waits_alone():
    model, calls = tiny_model(CONFIGS["llama"]), []
    inject_lora(model, ["o_proj"], rank=2, name="w")
    before = bits(model)

    def probe():
        calls.append(len(calls))
        if len(calls) == 2:
            raise SurgeryError("the second call")
        return model(random_ids(model.config, 1, 3))

    with pytest.raises(SurgeryError, match="the second call"):
        ablate(model, "x", heads={0: [1]}, merge=True, probe=probe)
    assert adapter_names(model) == ["w"]
    assert_same_bits(model, before)


def test_what_is_left_in_rounded_weights_is_what_the_report_says():
    model = tiny_model(CONFIGS["llama"]).bfloat16()
    along = torch.randn(CONFIGS["llama"].n_embd)
    unit = along / along.norm()
    report = ablate(model, "blind", direction=along, merge=True)
    for row in report.rows:
        weight = model.get_submodule(row["layer"]).weight.detach().float()
        left = float((unit @ weight).norm() / weight.norm())
        assert 1e-6 < left < 2**-7
        assert row["left"] == pytest.approx(left, rel=0.05)


def test_what_is_zero_already_is_not_cut_again():
    model = tiny_model(CONFIGS["llama"])
    ablate(model, "deaf", heads={0: [1]}, merge=True)
    with pytest.raises(SurgeryError, match="already"):
        ablate(model, "deaf", heads={0: [1]}, merge=True, plan=True)
    ablate(model, "deaf", heads={0: [1], 1: [0]}, merge=True)
