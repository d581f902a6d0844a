"""Editing a fact: the target becomes likelier by a ΔW of rank one, or nothing has happened."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from helpers.adapters import assert_same_bits, bits
from helpers.commands import called
from helpers.models import CONFIGS, assert_equal_logits, tiny_model, train_a_little
from transformers import AutoModelForCausalLM

from nanogpt_surgery import (
    CharacterTokenizer,
    SurgeryError,
    inject_lora,
    load_adapter,
    lora_log,
    open_model,
    save_model,
    undo_lora,
)
from nanogpt_surgery.history.folder_history import hashes_of
from nanogpt_surgery.interpret import causal_trace, patch, record, zero
from nanogpt_surgery.surgery import edit, editing

LETTERS = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz .FR")
FACT = ("capital of {} is", "France", " Rome")
TEXT = "the capital of a land is a town of that land. " * 8


def model_of(kind, seed=0):
    sizes = {"vocab_size": LETTERS.vocab_size, "block_size": 64, "n_layer": 3}
    return tiny_model(replace(CONFIGS[kind], **sizes), seed)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(editing, "STEPS", 10)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_the_target_becomes_likelier_by_a_change_of_rank_one_that_is_undone(kind):
    model = model_of(kind)
    before, ids = bits(model), torch.tensor([LETTERS.encode("capital of France is")])
    first = LETTERS.encode(" ")[0]
    neighbours = ["capital of Rome is", "a town"]
    plan = edit(model, LETTERS, *FACT, layer=1, plan=True)
    report = edit(model, LETTERS, *FACT, layer=1, text=TEXT, neighbours=neighbours)
    with torch.no_grad():
        after = float(model(ids)[0, -1].softmax(-1)[first])
    assert [row["kind"] for row in report.rows] == ["edited", "neighbour", "neighbour"]
    assert [row["prompt"] for row in report.rows[1:]] == neighbours
    summary = report.summary
    assert summary["target after"] > summary["target before"]
    assert report.rows[0]["target's first token after"] == pytest.approx(after, rel=1e-4)
    assert after > report.rows[0]["target's first token before"]
    assert summary["layer"] == plan.rows[0]["layer"] == "layers.1.mlp.down_proj"
    update = model.layers[1].mlp.down_proj.updates["edit"]
    assert update.rank == 1
    assert sum(p.numel() for p in update.parameters()) == plan.rows[0]["parameters"]
    assert summary["kl"] > 0 and summary["loss_before"] > 0
    assert "sha256" in summary["statistics"] and len(summary["statistics_sha256"]) == 64
    undo_lora(model)
    assert_same_bits(model, before)


def test_a_plan_counts_the_float32_copy_of_other_weights():
    model = model_of("llama")
    wide = edit(model, LETTERS, *FACT, layer=1, plan=True).summary["memory_bytes"]
    narrow = edit(model.bfloat16(), LETTERS, *FACT, layer=1, plan=True).summary["memory_bytes"]
    assert narrow - wide == (4 + 2 - 4) * model.n_parameters  # the copy, and the model's own


@torch.no_grad()
def test_the_value_of_the_key_moves_by_the_change_and_orthogonal_keys_stay():
    model = model_of("llama")
    ids = torch.tensor([LETTERS.encode(TEXT)[:48], LETTERS.encode(TEXT)[3:51]])
    covariance = editing.key_statistics(model, 1, ids)
    with record(model, "layers.1.neurons") as found:
        model(ids)
    keys = found["layers.1.neurons"][:, 1:].flatten(0, 1)
    torch.testing.assert_close(covariance, keys.mT @ keys / len(keys))
    delta = torch.randn(24)
    a, b = editing.rank_one(covariance, keys[:3], delta)
    torch.testing.assert_close(b @ a @ keys[0], delta, atol=1e-4, rtol=1e-4)
    # Of all changes that move the key so, this one moves the keys of the text least.
    ridge = editing.RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    alone, _ = editing.rank_one(covariance, keys[:1], delta)
    least = float(alone[0] @ (covariance + ridge) @ alone[0])
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        other = alone[0] + 0.1 * alone.norm() * torch.randn(len(covariance), generator=draw)
        other /= other @ keys[0]
        assert float(other @ (covariance + ridge) @ other) > least


def test_the_blocks_behind_the_layer_give_the_models_own_logits():
    model = model_of("qwen3")
    facts = editing.sentences(LETTERS, editing.Fact(*FACT), ["", "a town. "])
    assert facts.ids.shape == (2, 33)
    for row, start in enumerate((0, 8)):
        end = facts.subjects[row] + 1
        assert LETTERS.decode(facts.ids[row, start:end].tolist()) == "capital of France"
        said = facts.targets[row][facts.targets[row] >= 0]
        assert LETTERS.decode(said.tolist()) == " Rome"
    with torch.no_grad(), record(model, "layers.0.residual") as found:
        logits = model(facts.ids)
        rest = editing._rest(model, 0, facts.ids, found["layers.0.residual"])
    torch.testing.assert_close(rest, logits)


def test_without_a_text_the_model_speaks_itself_and_neighbours_are_chosen(monkeypatch):
    monkeypatch.setattr(editing, "STATISTICS", 256)
    model, bare = model_of("llama"), model_of("llama")
    inject_lora(model, "q_proj", rank=2)
    train_a_little(model)  # it waits, and is no part of the edit
    first = edit(model, LETTERS, *FACT)
    again = edit(bare, LETTERS, *FACT)
    assert first.summary == again.summary
    assert "256 tokens of the model's own text, seed 0" in first.summary["statistics"]
    assert first.summary["layer"] == "layers.0.mlp.down_proj"  # 3 // 4
    assert editing.own_text(bare, 64, 1).tolist() != editing.own_text(bare, 64, 2).tolist()


def test_what_cannot_be_edited_is_refused_and_nothing_has_happened():
    model = model_of("llama")
    before = bits(model)
    for fact, options, said in (
        (("no place", "France", " Rome"), {}, "0 times"),
        (("{} and {}", "France", " Rome"), {}, "2 times"),
        (("{} is", " ", " Rome"), {}, "empty"),
        (("{} is", "France", ""), {}, "empty"),
        (FACT, {"layer": 3}, r"layer 3.*0 to 2"),
        (FACT, {"name": "a b"}, "a b"),
        (FACT, {"text": "short"}, "5 tokens"),
        (("{} is", "France", "!"), {"text": TEXT}, "!"),
        (("{} is" + 60 * "a", "France", " Rome"), {"text": TEXT}, "64"),
    ):
        with pytest.raises(SurgeryError, match=said):
            edit(model, LETTERS, *fact, **options)
    with pytest.raises(SurgeryError, match="had to rise"):  # nothing looks back behind the last
        edit(model, LETTERS, *FACT, text=TEXT, layer=2)
    with patch(model, {"layers.2.mlp": zero()}):
        model(torch.zeros(1, 2, dtype=torch.long))
        with pytest.raises(SurgeryError, match=r"layers\.2\.mlp"):
            edit(model, LETTERS, *FACT, text=TEXT, layer=1)  # before and after: two models
    assert_same_bits(model, before)
    assert lora_log(model).rows == []


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft
def test_an_edit_is_a_folder_that_peft_opens_and_that_is_merged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_of("llama")
    save_model(model, "m", LETTERS)
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["model", "edit", "m", "--prompt", FACT[0], "--subject", FACT[1], "--target", FACT[2]]
    assert "layers.1.mlp" in called(*words, "--layer", 1, "--plan")[0]
    assert not (tmp_path / "e").exists()
    options = ["--text", "text.txt", "--layer", 1, "--neighbour", "a town"]
    called(*words, "--out", "e", *options)
    assert "overwrite" in called(*words, "--out", "e", *options, check=1)[1]
    entry = json.loads((tmp_path / "e" / "operations" / "journal.jsonl").read_text())
    assert entry["measured"]["target after"] > entry["measured"]["target before"]
    assert {"statistics", "statistics_sha256"} <= entry["measured"].keys()
    ids = torch.tensor([LETTERS.encode("capital of France is")])
    load_adapter(model, "e")
    with torch.no_grad():
        ours = model(ids)
        theirs = AutoModelForCausalLM.from_pretrained("m", dtype=torch.float32)
        assert_equal_logits(ours, peft.PeftModel.from_pretrained(theirs, "e")(ids).logits)
        called("merge", "m", "e", "--out", "merged")
        assert_equal_logits(open_model("merged")[0](ids), ours)


def test_an_edit_in_place_is_in_the_weights_and_is_undone_to_the_byte(tmp_path):
    wide = model_of("llama").bfloat16()
    save_model(wide, tmp_path / "m", LETTERS)
    (tmp_path / "text.txt").write_text(TEXT)
    before, folder = hashes_of(tmp_path / "m"), tmp_path / "m"
    words = ["model", "edit", folder, "--prompt", FACT[0], "--subject", FACT[1]]
    words += ["--target", FACT[2], "--layer", 1, "--text", tmp_path / "text.txt", "--json"]
    plan = json.loads(called(*words, "--plan")[0])
    assert plan["seconds"] > 0 and hashes_of(folder) == before
    done = json.loads(called(*words)[0])
    assert done["target after"] > done["target before"]
    assert "statistics' text" in done["measured_on"]
    model, _ = open_model(folder, "each")
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, wide.state_dict()[n])]
    assert changed == ["layers.1.mlp.down_proj.weight"]
    assert model.layers[1].mlp.down_proj.weight.dtype == torch.bfloat16
    called("undo", folder)
    assert hashes_of(folder) == before


@torch.no_grad()
def test_a_trace_restores_the_answer_where_all_is_restored():
    model = model_of("llama")
    ids = torch.tensor([LETTERS.encode("capital of France is")])
    subject = (11, 16)
    trace = causal_trace(model, ids, subject)
    probabilities = model(ids)[0, -1].softmax(-1)
    assert trace.answer == int(probabilities.argmax())
    assert trace.clean == pytest.approx(float(probabilities.max()), rel=1e-5)
    assert trace.corrupted != pytest.approx(trace.clean, rel=1e-3)
    assert len(trace.restored) == 3 and trace.best in range(3)
    assert trace.restored != [trace.corrupted] * 3
    last = causal_trace(model, ids, (19, 19), window=6)  # the subject is what is asked after
    assert last.restored[0] != last.corrupted
    for wrong in ((3, 20), (-1, 2), (4, 3)):
        with pytest.raises(SurgeryError, match=str(wrong[1])):
            causal_trace(model, ids, wrong)
