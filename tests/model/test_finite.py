"""Numbers that are not finite: where they first arose, and that nothing goes on with them."""

import io
import math
import sys

import pytest
import torch
from helpers.commands import called, write_model
from helpers.models import FAMILY_CONFIGS, random_ids, tiny_model

from nanogpt_surgery import (
    CharacterTokenizer,
    Conversation,
    SamplingSettings,
    generate,
    generate_batch,
    inject_lora,
    multiple_choice,
    open_model,
    perplexity,
    save_gguf,
    save_model,
)
from nanogpt_surgery.data.conversations.chat import ChatTemplate
from nanogpt_surgery.data.conversations.instructions import Example
from nanogpt_surgery.errors import NotFiniteError, SurgeryError
from nanogpt_surgery.generation.evaluation import Perplexity, answer_loss
from nanogpt_surgery.model.finite import check_finite, first_not_finite, is_finite

LETTERS = "".join(map(chr, range(53 + 32)[32:]))
IDS = random_ids(FAMILY_CONFIGS["llama"], 2, 7)


def overflowing(family="llama"):
    """Finite weights in half precision; a product in the second block passes 65,504."""
    model = tiny_model(FAMILY_CONFIGS[family])
    mlp = model.layers[1].mlp
    with torch.no_grad():
        for linear in (mlp.up_proj, getattr(mlp, "gate_proj", mlp.up_proj)):
            linear.weight.mul_(3e3)
    return model.half()


def damaged(parameter="layers.0.self_attn.v_proj.weight", value=math.nan):
    model = tiny_model(FAMILY_CONFIGS["llama"])
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[3] = value
    return model


def test_an_overflow_in_the_arithmetic_of_a_module_is_found_before_its_child():
    model = overflowing()
    origin = first_not_finite(model, lambda: model(IDS))
    assert (origin.module, origin.place) == ("layers.1.mlp", "before its down_proj")
    assert (origin.dtype, origin.parameter) == (torch.float16, "")
    assert model.float()(IDS).isfinite().all(), "what the hint says helps"


def test_an_overflow_in_a_product_is_found_at_the_linear():
    model = overflowing("gpt2")
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight.mul_(4)
    origin = first_not_finite(model, lambda: model(IDS))
    assert (origin.module, origin.place) == ("layers.1.mlp.up_proj", "its output")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    model = damaged(value=value)
    with pytest.raises(NotFiniteError, match=r"layers\.0\.self_attn\.v_proj\.weight has 1 of 480"):
        check_finite(model(IDS) * math.nan, model, lambda: model(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_numbers_whose_sum_is_beyond_the_dtype_are_finite_and_any_other_is_found(dtype):
    largest = torch.full((3, 500), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(largest) and is_finite(torch.zeros(0, dtype=dtype))
    for wrong in (float("nan"), float("inf"), float("-inf")):
        largest[2, 7] = wrong
        assert not is_finite(largest)
    largest[1, 7] = float("inf")  # their sum is NaN
    assert not is_finite(largest)


def test_a_factor_of_an_adapter_that_is_not_finite_is_named():
    model = tiny_model(FAMILY_CONFIGS["llama"])
    inject_lora(model, "q_proj", rank=2)
    factor = "layers.1.self_attn.q_proj.updates.default.lora_B"
    with torch.no_grad():
        model.get_parameter(factor)[0, 0] = math.nan
    assert factor in first_not_finite(model, lambda: model(IDS)).parameter


def test_finite_logits_run_nothing_again_and_the_model_is_left_as_it_was():
    model = damaged().train()
    check_finite(torch.zeros(3), model, lambda: pytest.fail("was run"))
    first_not_finite(model, lambda: model(IDS))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def trained(ids):
    return [Example(ids, [False] * 2 + [True] * (len(ids) - 2))]


LIBRARY = {
    "generate": lambda m, t: list(generate(m, [1, 2, 3], 2, seed=1)),
    "greedy": lambda m, t: list(generate(m, [1, 2, 3], 2, 0)),
    "batch": lambda m, t: list(generate_batch(m, [[1], [2, 3]], 2, SamplingSettings(0))),
    "batch, sliding": lambda m, t: list(generate_batch(m, [[1] * 18, [2]], 3, seed=0)),
    "perplexity": lambda m, t: perplexity(m, range(30)),
    "choices": lambda m, t: multiple_choice(m, t, "#$", ["%&", "'"]),
    "answers": lambda m, t: answer_loss(m, trained([1, 2, 3, 4, 5])),
}


@pytest.mark.parametrize("does", LIBRARY.values(), ids=LIBRARY)
@pytest.mark.parametrize(
    ("broken", "where", "hint"),
    [(overflowing, "layers.1.mlp", "torch.float32"), (damaged, "v_proj.weight", "copy")],
)
def test_the_library_refuses_to_go_on(does, broken, where, hint):
    with pytest.raises(NotFiniteError) as caught:
        does(broken(), CharacterTokenizer(LETTERS))
    assert where in caught.value.what
    assert hint in caught.value.hint


def test_what_is_said_to_a_model_that_breaks_was_not_said():
    talk = Conversation(overflowing(), CharacterTokenizer(LETTERS), ChatTemplate("none"))
    with pytest.raises(NotFiniteError):
        list(talk.ask("#$", 4))
    assert talk.messages == []
    talk.model.float()
    talk.weights_changed()
    assert list(talk.ask("#$", 4, SamplingSettings(0)))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_an_export_whose_logits_are_not_finite_is_not_kept(tmp_path, kind):
    model = tiny_model(FAMILY_CONFIGS["llama"])  # an export computes in float32
    with torch.no_grad():
        for linear in (model.layers[1].mlp.up_proj, model.layers[1].mlp.gate_proj):
            linear.weight.mul_(1e30)
    error = NotFiniteError if kind in ("F32", "BF16") else SurgeryError  # halves end at 65,504
    with pytest.raises(error, match=r"layers\.1\.mlp"):
        save_gguf(model, tmp_path / "m.gguf", CharacterTokenizer(LETTERS), kind)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_beyond_what_has_an_exponential_is_an_infinite_perplexity():
    assert Perplexity(1e4, 3).perplexity == math.inf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("finite")
    model = write_model(place / "plain", block_size=80)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight.mul_(5e4)
    save_model(model.half(), place / "m", open_model(place / "plain")[1])
    (place / "text.txt").write_text("a text of several letters")
    (place / "choices.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n')
    (place / "answers.jsonl").write_text('{"prompt": "a", "answer": "b c d"}\n')
    return place


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "m", "--prompt", "a"],
        ["generate", "m", "--prompt", "a", "--temperature", 0, "--json"],
        ["generate", "m", "--prompt", "a", "--samples", 2],
        ["chat", "m"],
        ["eval", "m", "text.txt"],
        ["eval", "m", "choices.jsonl", "--json"],
        ["eval", "m", "answers.jsonl"],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_commands_say_where_and_what_to_type(folder, monkeypatch, words):
    monkeypatch.chdir(folder)
    data = io.TextIOWrapper(io.BytesIO(b"hello\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", data)
    out, errors = called(*words, check=1)
    assert "layers.1.mlp" in errors
    assert "--dtype float32" in errors
    assert "nan" not in (out + errors).lower()


def test_no_logits_at_all_are_finite():
    check_finite(torch.empty(0, 5), tiny_model(FAMILY_CONFIGS["gpt2"]), lambda: None)
