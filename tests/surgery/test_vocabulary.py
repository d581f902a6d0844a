"""Tokens come and go: tables, tokenizer and config keep step, and old logits their bits."""

from dataclasses import replace

import pytest
import torch
from helpers.adapters import adapted, assert_same_bits, bits
from helpers.models import CONFIGS, random_ids, tiny_model
from helpers.tokenizers import TEXT

from nanogpt_surgery import (
    BPETokenizer,
    CharacterTokenizer,
    SurgeryError,
    generate,
    inject_lora,
    redo_lora,
    undo_lora,
)
from nanogpt_surgery.surgery import (
    add_tokens,
    drop_unused_tokens,
)

CHARACTERS = CharacterTokenizer("".join(map(chr, range(65, 118))))  # 53, as the tiny models have
BPE = BPETokenizer.train(TEXT, 300)


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny_model(CONFIGS[request.param])


def model_for_bpe(name="llama", rows=BPE.vocab_size):
    return tiny_model(replace(CONFIGS[name], vocab_size=rows))


def tables(model):
    previous = model.embed_prev_tokens
    more = previous if model.config.n_prev_tokens else []
    return [model.embed_tokens.weight, *(table.weight for table in more), model.lm_head.weight]


@torch.no_grad()
def test_a_new_token_has_a_mean_row_in_each_table(model):
    ids, before, config = random_ids(model.config, 2, 7), bits(model), model.config
    plain, old = model(ids), [table.clone() for table in tables(model)]
    tokenizer, report = add_tokens(model, CHARACTERS, ["!", "?"], probe=ids)
    assert (tokenizer.vocab_size, model.config.vocab_size) == (55, 55)
    assert model.config.n_parameters == sum({id(p): p.numel() for p in model.parameters()}.values())
    assert (model.lm_head.weight is model.embed_tokens.weight) is config.tie_head
    assert ("tied" in report.summary["head"]) is config.tie_head
    for table, rows in zip(tables(model), old, strict=True):
        assert torch.equal(table[:53], rows)
        torch.testing.assert_close(table[53:], rows.mean(0).expand(2, -1))
    torch.testing.assert_close(model(ids)[..., :53], plain)
    assert [row["id"] for row in report.rows] == [53, 54]
    share = model(ids).softmax(-1)[..., 53:].sum(-1).mean()
    assert report.summary["probability_of_the_others"] == pytest.approx(float(share), rel=1e-3)
    assert report.summary["loss_after"] > report.summary["loss_before"]
    undo_lora(model)
    assert model.config is config
    assert_same_bits(model, before)
    assert torch.equal(model(ids), plain)
    redo_lora(model)
    assert model.config.vocab_size == 55


@torch.no_grad()
def test_dropped_tokens_leave_the_rows_of_the_others(model):
    texts = ["HELLO", "WORLD", "abc"]
    kept = sorted({i for text in texts for i in CHARACTERS.encode(text)})
    ids, before, config = torch.tensor([CHARACTERS.encode("HELD")]), bits(model), model.config
    plain = model(ids)
    tokenizer, report = drop_unused_tokens(model, CHARACTERS, texts, probe=ids)
    assert model.config.vocab_size == tokenizer.vocab_size == len(kept)
    torch.testing.assert_close(model(torch.tensor([tokenizer.encode("HELD")])), plain[..., kept])
    assert (model.lm_head.weight is model.embed_tokens.weight) is config.tie_head
    left = plain.softmax(-1)[..., kept].sum(-1).mean()
    assert report.summary["probability_of_the_others"] == pytest.approx(1 - float(left), rel=1e-3)
    assert report.summary["loss_after"] < report.summary["loss_before"]
    undo_lora(model)
    assert_same_bits(model, before)
    assert model.config is config


@torch.no_grad()
def test_a_token_begins_as_the_mean_of_its_pieces():
    model = model_for_bpe()
    pieces = BPE.encode(" lazy brown")
    rows = [table[pieces].mean(0) for table in tables(model)]
    tokenizer, report = add_tokens(model, BPE, [" lazy brown"])
    assert report.rows[0]["mean of"] == " ".join(map(str, pieces))
    [new] = tokenizer.encode(" lazy brown")
    for table, row in zip(tables(model), rows, strict=True):
        torch.testing.assert_close(table[new], row)


@torch.no_grad()
def test_rows_without_a_token_are_given_to_new_ones_and_dropped():
    model = model_for_bpe(rows=BPE.vocab_size + 1)
    tokenizer, _ = add_tokens(model, BPE, ["<a>", "<b>"])
    assert model.config.vocab_size == tokenizer.vocab_size == BPE.vocab_size + 2
    undo_lora(model)
    add_tokens(model, BPE, ["<a>"], init="mean")
    assert model.config.vocab_size == BPE.vocab_size + 1
    mean = model.embed_tokens.weight[:-1].mean(0)
    torch.testing.assert_close(model.embed_tokens.weight[-1], mean)
    undo_lora(model)
    tokenizer, _ = drop_unused_tokens(model, BPE, "The quick brown fox")
    assert model.config.vocab_size == tokenizer.vocab_size < BPE.vocab_size


@torch.no_grad()
def test_a_change_of_a_kept_row_is_noticed(monkeypatch):
    model = tiny_model(CONFIGS["gpt2"])
    before, config = bits(model), model.config
    place = "nanogpt_surgery.surgery.vocabulary._rows"
    monkeypatch.setattr(place, lambda weight, change: torch.randn(len(change.old), weight.size(1)))
    with pytest.raises(SurgeryError, match="to the bit"):
        add_tokens(model, CHARACTERS, ["!"])
    assert_same_bits(model, before)
    assert model.config is config


def test_an_adapter_beside_the_tables_stays_and_one_on_them_is_refused():
    model = tiny_model(CONFIGS["llama"])
    inject_lora(model, "q_proj")
    add_tokens(model, CHARACTERS, ["!"])
    assert model.embed_tokens.weight.requires_grad is False
    model = adapted(CONFIGS["llama"], "lm_head")
    before = bits(model)
    for plan in (False, True):
        with pytest.raises(SurgeryError, match="lm_head"):
            add_tokens(model, CHARACTERS, ["!"], plan=plan)
    assert_same_bits(model, before)


def test_plans_say_what_comes():
    model = tiny_model(CONFIGS["gpt2"])
    before = bits(model)
    for operate, what in ((add_tokens, ["!"]), (drop_unused_tokens, "ABCDE")):
        _, planned = operate(model, CHARACTERS, what, plan=True)
        assert_same_bits(model, before)
        _, done = operate(model, CHARACTERS, what)
        assert planned.rows == done.rows
        there = planned.summary.keys() & done.summary.keys()
        assert {k: planned.summary[k] for k in there} == {k: done.summary[k] for k in there}
        assert planned.summary["memory_bytes"] > done.summary["model_before_bytes"]
        assert done.summary["parameters_after"] == model.config.n_parameters
        undo_lora(model)


def test_what_cannot_be_is_named():
    model = tiny_model(CONFIGS["gpt2"])
    before = bits(model)
    with pytest.raises(SurgeryError, match=r"id 5\b"):
        drop_unused_tokens(model, CHARACTERS, "ABC", probe=torch.tensor([[0, 5]]))
    with pytest.raises(SurgeryError, match=r"53.*0 to 52"):
        add_tokens(model, CHARACTERS, ["!"], probe=torch.tensor([[53]]))
    with pytest.raises(SurgeryError, match="no token"):
        add_tokens(model, CHARACTERS, [])
    assert_same_bits(model, before)


@pytest.mark.parametrize("engine", ["native", "plain"])
def test_generation_goes_on_in_the_new_vocabulary(engine):
    model = tiny_model(CONFIGS["llama"])
    before = list(generate(model, [3, 1, 4], 5, top_k=1, engine=engine))
    text = CHARACTERS.decode([3, 1, 4, *before])
    tokenizer, _ = drop_unused_tokens(model, CHARACTERS, text)
    prompt = tokenizer.encode(CHARACTERS.decode([3, 1, 4]))
    after = generate(model, prompt, 5, top_k=1, engine=engine)
    assert tokenizer.decode(after) == CHARACTERS.decode(before)


@pytest.mark.parametrize("token", ["\ud800", "fox \udcff"])
def test_what_no_file_of_text_can_hold_is_no_token(token):
    model = model_for_bpe()
    with pytest.raises(SurgeryError, match="surrogate"):
        add_tokens(model, BPE, [token])
    assert model.config.vocab_size == BPE.vocab_size
