"""Layers are taken out and doubled; the config keeps step, and undo brings every bit back."""

from contextlib import suppress

import pytest
import torch
from helpers.adapters import adapted, assert_same_bits, bits
from helpers.models import CONFIGS, random_ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nanogpt_surgery import (
    CharacterTokenizer,
    GPTConfig,
    KVCache,
    SurgeryError,
    generate,
    inject_lora,
    load_adapter,
    lora_log,
    merge_lora,
    open_model,
    redo_lora,
    remove_lora,
    save_adapter,
    save_model,
    tensor_hashes,
    undo_lora,
)
from nanogpt_surgery.interpret import patch, record, zero
from nanogpt_surgery.lora.several import has_lora
from nanogpt_surgery.surgery import (
    add_tokens,
    drop_unused_tokens,
    duplicate_layers,
    prune_layers,
)

LLAMA = CONFIGS["llama"]


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny_model(CONFIGS[request.param])


def assert_is_config(model):
    """The config counts what the modules hold."""
    assert len(model.layers) == model.config.n_layer
    distinct = {id(p): p.numel() for p in model.parameters()}
    assert sum(distinct.values()) == model.config.n_parameters


@torch.no_grad()
def test_a_pruned_model_computes_what_the_other_layers_compute(model):
    ids, before, config = random_ids(model.config, 2, 7), bits(model), model.config
    with patch(model, {"layers.0.self_attn": zero(), "layers.0.mlp": zero()}):
        expected = model(ids)
    plain, kept = model(ids), model.layers[1]
    report = prune_layers(model, [0], probe=ids)
    assert model.layers[0] is kept
    assert_is_config(model)
    torch.testing.assert_close(model(ids), expected)
    assert [(row["layer"], row["becomes"]) for row in report.rows] == [("layers.0", None)]
    assert report.summary["kl"] > 0
    assert report.summary["parameters_after"] == model.config.n_parameters
    assert report.summary["loss_before"] != report.summary["loss_after"]
    undo_lora(model)
    assert model.config is config
    assert_same_bits(model, before)
    assert torch.equal(model(ids), plain)
    redo_lora(model)
    assert_is_config(model)
    torch.testing.assert_close(model(ids), expected)


@torch.no_grad()
def test_copies_leave_every_logit_as_it_was(model):
    ids, before, config = random_ids(model.config, 2, 7), bits(model), model.config
    plain = model(ids)
    report = duplicate_layers(model, [1, 0, 1])
    assert torch.equal(model(ids), plain)
    assert [row["becomes"] for row in report.rows] == [
        "layers.0, layers.1",
        "layers.2, layers.3, layers.4",
    ]
    assert report.summary["largest_error"] == 0
    assert report.summary["top_token_unchanged"] == 1
    assert_is_config(model)
    for name, parameter in model.layers[1].named_parameters():
        silent = "o_proj" in name or "down_proj" in name
        assert torch.equal(parameter, 0 * parameter if silent else before[f"layers.0.{name}"]), name
        assert parameter is not model.layers[0].get_parameter(name)
    undo_lora(model)
    assert model.config is config
    assert_same_bits(model, before)


def test_a_copy_learns():
    model = tiny_model(LLAMA).train()
    duplicate_layers(model, [0])
    assert all(module.training for module in model.modules())
    model(random_ids(LLAMA, 1, 5)).sum().backward()
    twin = model.layers[1]
    assert twin.mlp.down_proj.weight.grad.abs().sum() > 0
    assert twin.self_attn.o_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_copy_that_would_change_a_logit_is_not_made(monkeypatch):
    monkeypatch.setattr("nanogpt_surgery.surgery.structure.WRITERS", ("mlp.down_proj",))
    model = tiny_model(LLAMA)
    before, config = bits(model), model.config
    with pytest.raises(SurgeryError, match="to the bit"):
        duplicate_layers(model, [0])
    assert_same_bits(model, before)
    assert model.config is config
    assert not lora_log(model).rows


@torch.no_grad()
def test_an_adapter_stays_on_the_layers_that_stay():
    model = adapted(LLAMA)
    ids, before = random_ids(LLAMA, 2, 7), bits(model)
    plain = model(ids)
    duplicate_layers(model, [0])
    assert torch.equal(model(ids), plain)
    assert not [name for name, _ in model.layers[1].named_modules() if "updates" in name]
    prune_layers(model, [1])  # the copy again
    assert torch.equal(model(ids), plain)
    report = prune_layers(model, [0])
    assert report.rows[0]["updates"] == 7
    bare = adapted(LLAMA)
    bare.layers = bare.layers[1:]
    assert torch.equal(model(ids), bare(ids))
    for _ in range(3):
        undo_lora(model)
    assert_same_bits(model, before)


def test_a_copy_made_below_an_adapter_trains_when_it_has_gone():
    model = tiny_model(LLAMA)
    inject_lora(model, "q_proj")
    duplicate_layers(model, [0])
    assert not any(p.requires_grad for p in model.layers[1].parameters())
    remove_lora(model)
    assert all(p.requires_grad for p in model.parameters())
    undo_lora(model)
    undo_lora(model)
    remove_lora(model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_is_not_taken_off_in_passing():
    model = tiny_model(LLAMA)
    inject_lora(model, ["layers.0.self_attn.q_proj"], name="small")
    with pytest.raises(SurgeryError, match="small"):
        prune_layers(model, [0])
    prune_layers(model, [1])


def test_what_is_not_there_is_named():
    model = tiny_model(LLAMA)
    before = bits(model)
    wrong = [
        ([2], r"layer 2.*0 to 1"),
        ([-1], r"layer -1.*0 to 1"),
        ([0.5], r"0\.5"),
        ([], "0 to 1"),
    ]
    for layers, said in wrong:
        for operate in (prune_layers, duplicate_layers):
            for plan in (False, True):
                with pytest.raises(SurgeryError, match=said):
                    operate(model, layers, plan=plan)
    with pytest.raises(SurgeryError, match="all 2 layers"):
        prune_layers(model, [0, 1])
    with pytest.raises(SurgeryError, match=r"53.*0 to 52"):
        prune_layers(model, [0], probe=torch.tensor([[53]]))
    assert_same_bits(model, before)


def test_a_plan_says_what_comes_and_changes_nothing():
    model = tiny_model(LLAMA)
    before = bits(model)
    for operate in (duplicate_layers, prune_layers):
        planned = operate(model, [1], plan=True)
        assert_same_bits(model, before)
        done = operate(model, [1])
        assert planned.rows == done.rows
        there = planned.summary.keys() & done.summary.keys()
        assert "model_after_bytes" in there
        assert {k: planned.summary[k] for k in there} == {k: done.summary[k] for k in there}
        assert planned.summary["memory_bytes"] >= planned.summary["model_before_bytes"]
        assert planned.summary["seconds"] > 0
        assert done.summary["model_after_bytes"] == 4 * model.config.n_parameters
        undo_lora(model)


def test_a_model_that_is_watched_keeps_its_structure():
    model = tiny_model(LLAMA)
    with record(model, "layers.1.residual"), pytest.raises(SurgeryError, match=r"layers\.1"):
        prune_layers(model, [0])
    with patch(model, {"layers.0.heads": zero()}):
        model(random_ids(LLAMA, 1, 3))
        with pytest.raises(SurgeryError, match=r"layers\.0"):
            duplicate_layers(model, [0])
    prune_layers(model, [0])


@pytest.mark.parametrize("engine", ["native", "plain"])
def test_nothing_is_computed_with_the_structure_of_before(engine):
    model, other = tiny_model(LLAMA), tiny_model(LLAMA)
    prune_layers(other, [0])
    expected = list(generate(other, [3, 1, 4], 4, top_k=1, engine=engine))
    list(generate(model, [3, 1, 4], 4, top_k=1, engine=engine))
    stale = KVCache(model.config)
    begun = generate(model, [3, 1, 4], 4, top_k=1, cache=stale, engine=engine)
    next(begun)
    prune_layers(model, [0])
    with pytest.raises(SurgeryError, match=r"2 layers.*1|1 and 2"):
        next(begun)
    with pytest.raises(SurgeryError, match=r"2 layers.*1|1 and 2"):
        list(generate(model, [3, 1, 4], 4, cache=stale, engine=engine))
    assert list(generate(model, [3, 1, 4], 4, top_k=1, engine=engine)) == expected
    duplicate_layers(model, [0, 0])
    assert list(generate(model, [3, 1, 4], 4, top_k=1, engine=engine)) == expected


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft
def test_an_adapter_is_saved_beside_copies_that_have_none(tmp_path):
    model, ids = adapted(LLAMA), random_ids(LLAMA, 2, 7)
    duplicate_layers(model, [0])
    with torch.no_grad():
        expected = model(ids)
    save_adapter(model, tmp_path / "a")
    remove_lora(model)
    save_model(model, tmp_path / "m")
    again, _ = open_model(tmp_path / "m")
    load_adapter(again, tmp_path / "a")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids), expected)
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=1e-4)
    other = tiny_model(LLAMA)
    with pytest.raises(SurgeryError, match="another model"):
        load_adapter(other, tmp_path / "a")


OPERATIONS = {
    "prune": lambda model: prune_layers(model, [0]),
    "double": lambda model: duplicate_layers(model, [0, 0]),
    "add": lambda model: add_tokens(model, letters_of(model), ["é"]),
    "drop": lambda model: drop_unused_tokens(model, letters_of(model), "ABCDEFGH"),
    "inject": lambda model: inject_lora(model, ["up_proj"], rank=2),
    "merge": lambda model: merge_lora(model, force=True),
    "remove": remove_lora,
}


def letters_of(model):
    return CharacterTokenizer("".join(map(chr, range(65, 65 + model.config.vocab_size))))


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["gpt2", "llama", "prev-tokens-relu2"]),
    steps=st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=7),
)
def test_any_sequence_undone_gives_the_first_hash(name, steps):
    model = tiny_model(CONFIGS[name])
    first, config = tensor_hashes(model), model.config
    trains = [p.requires_grad for p in model.parameters()]
    for step in steps:
        with suppress(SurgeryError):  # there is one layer left, or no adapter
            OPERATIONS[step](model)
    if not has_lora(model):
        assert_is_config(model)
    for _ in range(len(lora_log(model).rows)):
        undo_lora(model)
    assert tensor_hashes(model) == first
    assert model.config is config
    assert [p.requires_grad for p in model.parameters()] == trains


@torch.no_grad()
def test_a_quantised_model_is_pruned_and_not_doubled(tmp_path):
    config = GPTConfig(53, n_embd=32, n_head=2, n_layer=2, block_size=19)
    save_model(tiny_model(config), tmp_path / "m")
    model, _ = open_model(tmp_path / "m", quantize="int8")
    ids = random_ids(config, 2, 7)
    with pytest.raises(SurgeryError, match="quantised"):
        duplicate_layers(model, [0])
    with patch(model, {"layers.1.self_attn": zero(), "layers.1.mlp": zero()}):
        expected = model(ids)
    prune_layers(model, [1])
    assert torch.equal(model(ids), expected)
