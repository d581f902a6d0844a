"""`surgery adapter combine`, `compress`, `extract`, `ablate`: folders that peft opens."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers.commands import called
from helpers.models import CONFIGS, random_ids, tiny_model, train_a_little

from nanogpt_surgery import inject_lora, load_adapter, open_model, save_adapter, save_model
from nanogpt_surgery.history.folder_history import hashes_of
from nanogpt_surgery.interpret import patch, zero

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A base, two adapters of it, and the base with the first one merged."""
    monkeypatch.chdir(tmp_path)
    base = tiny_model(CONFIGS["llama"])
    save_model(base, "base")
    for seed, name in enumerate(("one", "two")):
        model, _ = open_model("base")
        inject_lora(model, ["q_proj", "down_proj"], rank=2 + seed, alpha=3)
        train_a_little(model, seed=seed, size=0.3)
        save_adapter(model, name, "base")
    called("merge", "base", "one", "--out", "tuned", "--tolerance", 1)
    return tmp_path


def report_of(*words):
    return json.loads(called("adapter", *words, "--json")[0])


def logits(adapter, ids):
    model, _ = open_model("base")
    load_adapter(model, adapter)
    with torch.no_grad():
        return model(ids)


def their_logits(adapter, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, adapter).eval()(ids).logits


def ids_of_base():
    return random_ids(open_model("base")[0].config, 2, 7)


def test_a_combination_is_the_blend_and_peft_opens_it(folders):
    words = ("combine", "one=0.5", "two=-1", "--out", "both")
    plan = report_of(*words, "--plan")
    assert plan["layers"] == 4 and not Path("both").exists()
    done = report_of(*words)
    assert {row["rank"] for row in done["rows"]} == {5}
    assert done["adapter_bytes"] == plan["adapter_bytes"] and done["largest_error"] < 1e-4
    ids = ids_of_base()
    torch.testing.assert_close(their_logits("both", ids), logits("both", ids), atol=1e-4, rtol=0)
    assert "combine 0.5 one + -1 two" in called("log", "both")[0]
    called(*("adapter", *words), check=1)  # it is there
    report_of(*words, "--overwrite")


def test_compressing_in_place_is_undone_to_the_bit(folders):
    before = hashes_of(Path("two"))
    plan = report_of("compress", "two", "--rank", 1, "--plan")
    assert plan["written_to"] == "two, in place"
    assert plan["kept_originals_bytes"] == Path("two/adapter_model.safetensors").stat().st_size
    assert hashes_of(Path("two")) == before
    done = report_of("compress", "two", "--rank", 1)
    assert {row["rank"] for row in done["rows"]} == {1} and done["kl"] > 0
    assert done["loss_before"] > 0
    entry = json.loads(Path("two/operations/journal.jsonl").read_text().splitlines()[-1])
    assert entry["operation"] == "compress two"
    called("undo", "two")
    assert hashes_of(Path("two")) == before


def test_combining_into_one_of_them_changes_it_in_place_and_says_how_to_undo_it(folders):
    before, other = hashes_of(Path("two")), hashes_of(Path("one"))
    _, said = called("adapter", "combine", "one", "two=-1", "--out", "two")
    assert "surgery undo two" in said and "merge" not in said
    assert hashes_of(Path("two")) != before and hashes_of(Path("one")) == other
    called("undo", "two")
    assert hashes_of(Path("two")) == before


def test_a_plan_says_what_the_deed_takes_and_hints_can_be_followed(folders):
    words = ["adapter", "combine", "one", "two=-1", "--plan", "--out"]
    assert "--overwrite" in called(*words, "tuned")[1]
    assert "--overwrite" not in called(*words, "tuned", "--overwrite")[1]
    assert "--overwrite" not in called(*words, "new")[1]
    Path("theirs").mkdir()
    Path("theirs/page.html").write_text("")
    assert "theirs" in called(*words, "theirs", check=1)[1]
    said = called("adapter", "extract", "base", "tuned", "--rank", 1, "--out", "base", check=1)[1]
    assert "base itself" in said and "in place" not in said


def test_an_extracted_adapter_gives_the_tuned_models_logits(folders):
    done = report_of("extract", "base", "tuned", "--rank", 2, "--out", "back")
    assert done["layers"] == 4 and done["largest_error"] < 1e-4
    ids = ids_of_base()
    with torch.no_grad():
        tuned = open_model("tuned")[0](ids)
    torch.testing.assert_close(their_logits("back", ids), tuned, atol=1e-4, rtol=0)


def test_an_ablation_is_an_adapter_that_peft_opens(folders):
    done = report_of("ablate", "base", "--heads", "1:0,2-3", "--out", "less")
    assert [row["layer"] for row in done["rows"]] == ["layers.1.self_attn.o_proj"]
    ids, model = ids_of_base(), open_model("base")[0]
    with patch(model, {"layers.1.heads": zero(heads=[0, 2, 3])}), torch.no_grad():
        wanted = model(ids)
    torch.testing.assert_close(their_logits("less", ids), wanted, atol=1e-4, rtol=0)
    for wrong in (("--heads", "one"), ("--heads", "9:0"), ("--neurons", "0:4-999999999")):
        called("adapter", "ablate", "base", *wrong, "--out", "no", check=1)
    assert not Path("no").exists()


def test_an_ablation_in_place_is_in_the_weights_and_is_undone_to_the_bit(folders):
    before = hashes_of(Path("base"))
    ids, model = ids_of_base(), open_model("base")[0]
    words = ("ablate", "base", "--heads", "1:0,2-3")
    plan = report_of(*words, "--plan")
    assert plan["written_to"] == "base, in place" and hashes_of(Path("base")) == before
    assert plan["memory_bytes"] > plan["adapter_bytes"] > 0 and plan["seconds"] > 0
    done = report_of(*words)
    assert done["kl"] > 0 and done["originals"] == "kept"
    with patch(model, {"layers.1.heads": zero(heads=[0, 2, 3])}), torch.no_grad():
        torch.testing.assert_close(open_model("base")[0](ids), model(ids), atol=1e-4, rtol=0)
    called("undo", "base")
    assert hashes_of(Path("base")) == before


def test_intruders_are_taken_out(folders):
    model, _ = open_model("base")
    inject_lora(model, ["q_proj"], rank=1, alpha=1)
    with torch.no_grad():
        for layer in model.layers:
            update = layer.self_attn.q_proj.updates["default"]
            weight = layer.self_attn.q_proj.original_layer.weight
            u, s, vh = torch.linalg.svd(weight)
            update.lora_A.copy_(vh[-3:].sum(0, keepdim=True))
            update.lora_B.copy_(s[0] * 3 * u[:, -3:].sum(1, keepdim=True))
    save_adapter(model, "loud", "base")
    assert sum(r["intruders"] for r in report_of("examine", "loud")["rows"]) >= 2
    done = report_of("compress", "loud", "--intruders", 0, "--out", "quiet")
    assert all(row["intruders"] >= 1 for row in done["rows"])
    assert sum(r["intruders"] for r in report_of("examine", "quiet")["rows"]) == 0


def test_the_chat_template_goes_with_the_adapter_and_a_run_stays_as_it_is(folders):
    (Path("two") / "MANIFEST.json").unlink()
    (Path("two") / "chat_template.jinja").write_text("{{ messages[0].content }}")
    report_of("combine", "one", "two", "--out", "both")
    assert (Path("both") / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    run = Path("run/checkpoints/step-00000001")
    run.parent.mkdir(parents=True)
    shutil.copytree("one", run)
    Path("run/run.json").write_text("{}")
    before = hashes_of(run)
    for words in (["compress", run], ["compress", "run"]):
        assert "run" in called("adapter", *words, "--rank", 1, check=1)[1]
    assert hashes_of(run) == before
