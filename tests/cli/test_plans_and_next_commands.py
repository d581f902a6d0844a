"""Every plan says whether memory and disk suffice; commands end with the next one."""

import json
import re
from pathlib import Path

import pytest
from helpers.commands import LETTERS, called, write_adapter

from nanogpt_surgery import (
    CharacterTokenizer,
    SimpleGPT,
    inject_lora,
    memory,
    save_adapter,
    save_model,
)
from nanogpt_surgery.report import Report

TINY = "--n-embd 16 --n-head 2 --n-layer 1 --block-size 16".split()
STEPS = "--max-steps 2 --batch-size 2 --evaluate-every 0".split()
PLANS = {
    "train": ["train", "t.txt", "--out", "none", "--plan", *TINY, *STEPS],
    "finetune": ["finetune", "m", "t.txt", "--out", "none", "--plan", "--block-size", "16", *STEPS],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("plans")
    tokenizer = CharacterTokenizer(LETTERS)
    llama = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": "none"}
    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 2, "block_size": 200}
    model = SimpleGPT(tokenizer.vocab_size, **sizes, **llama).eval()
    save_model(model, found / "m", tokenizer)
    write_adapter(model, found / "a", 1)
    inject_lora(model, ["q_proj"])
    save_adapter(model, found / "b")
    (found / "t.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    pairs = [{"prompt": f"{i} + 1", "completion": f"{i + 1}"} for i in range(20)]
    (found / "pairs.json").write_text(json.dumps(pairs))
    return found


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.mark.parametrize("command", PLANS)
def test_a_plan_says_what_is_free(command: str, place: Path) -> None:
    found = json.loads(called(*PLANS[command], "--json")[0])
    assert found["available_bytes"] > found["weights_bytes"] > 0
    assert found["free_bytes"] > 0
    out, errors = called(*PLANS[command])
    assert out.count("(fits: ") == 2, "memory and disk"
    assert re.search(r"--plan|surgery finetune m ", errors.splitlines()[-1])
    assert not (place / "none").exists()


@pytest.mark.parametrize("command", PLANS)
def test_a_plan_says_that_memory_does_not_suffice(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 0 kB\nSwapFree: 0 kB\n")
    monkeypatch.setattr(memory, "PROC", tmp_path)
    found = json.loads(called(*PLANS[command], "--json")[0])
    assert found["available_bytes"] == found["weights_bytes"], "those that are open already"
    assert found["available_bytes"] < found["memory_bytes"]
    assert called(*PLANS[command])[0].count("(does not fit: ") == 1


@pytest.mark.parametrize(
    ("arguments", "following"),
    [
        (["merge", "m", "a", "--out", "x", "--plan"], "--plan"),
        (["doctor"], "surgery train"),
        (["eval", "m", "t.txt"], "surgery generate m "),
        (["eval", "m", "pairs.json", "--adapter", "a"], "surgery chat m --adapter a"),
        (["export", "m", "--out", "f.gguf"], "surgery generate f.gguf "),
        (["export", "m", "--out", "folder", "--format", "huggingface"], "surgery generate folder "),
        (
            ["export", "m", "--adapter", "a", "--out", "l.gguf", "--format", "lora-gguf"],
            "--lora l.",
        ),
        (
            ["export", "m", "--adapter", "b", "--out", "mlx", "--format", "mlx"],
            "--adapter-path mlx",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_last_line_is_the_next_command(arguments: list[str], following: str) -> None:
    last = called(*arguments)[1].splitlines()[-1]
    assert following in last


def test_train_has_no_flag_that_does_nothing() -> None:
    assert "--all" in called("finetune", "--help")[0].split()
    assert "--all" not in called("train", "--help")[0].split()


def test_inspect_says_the_kind_of_tokenizer_in_words() -> None:
    found = json.loads(called("inspect", "m", "--json")[0])["tokenizer"]
    assert "characters" in found and "Tokenizer" not in found


def test_a_sample_without_an_answer_is_said_and_one_of_lines_is_one_line() -> None:
    report = Report("t", [], {"sample_before": "", "sample_after": "a\nb"})
    assert report.to_text(60).splitlines() == ["t", "sample before: (nothing)", "sample after: a b"]
