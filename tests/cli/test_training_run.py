"""A run: how long it is, when it stops, what it saves, and what it says of the model meanwhile."""

import json
from pathlib import Path

import pytest
import torch
from helpers.commands import called, write_model

from nanogpt_surgery import (
    CharacterTokenizer,
    FitSettings,
    GPTDataset,
    SurgeryError,
    evaluate,
    generate,
    load_adapter,
    open_model,
    save_model,
)
from nanogpt_surgery.files.atomic import file_hash
from nanogpt_surgery.runs import training
from nanogpt_surgery.runs.checkpoints import RunFolder
from nanogpt_surgery.runs.run import evaluations_since_best
from nanogpt_surgery.runs.summary import one_line
from nanogpt_surgery.runs.training import SaveInterval, with_length
from nanogpt_surgery.training.step import Step

TEXT = "to be, or not to be: that is the question.\n" * 40
NEW = (
    "--n-embd 16 --n-head 2 --n-layer 1 --block-size 12 --batch-size 4 --precision float32".split()
)
TUNED = "--batch-size 4 --rank 2 --block-size 64 --precision float32".split()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text, a model with its instruction data: 20 examples, of which 18 are trained on."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    write_model(Path("m"))
    records = [{"instruction": f"Add {i}", "output": str(i + 1)} for i in range(20)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def summary(*words: object) -> dict:
    return json.loads(called(*words, "--json")[0])


def lines(run: str, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(row) for row in Path(run, name).read_text().splitlines()]


def steps_of(run: str) -> list[int]:
    return [row["step"] for row in lines(run)]


def weights(run: str) -> str:
    names = sorted(path.name for path in Path(run, "checkpoints").iterdir())
    return file_hash(Path(run, "checkpoints", names[-1], "training.safetensors"))


class Killed(BaseException):
    """In the place of a SIGKILL."""


def killed_at(step: int, *words: object) -> None:
    """A command that ends after a step, before anything of it is written."""
    record = RunFolder.record

    def kill(run: RunFolder, done: Step) -> None:
        if done.step == step:
            raise Killed
        record(run, done)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "record", kill)
        called(*words)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ([], 14),  # 3 × 18 / 4
        (["--epochs", "1"], 5),
        (["--epochs", "0.5", "--grad-accum-steps", "2"], 2),
        (["--max-steps", "3"], 3),
    ],
)
def test_the_length_follows_from_the_data(place, flags, steps):
    words = ["finetune", "m", "a.jsonl", "--out", "o", *TUNED, "--template", "chatml", *flags]
    out, said = called(*words, "--sample-every", "0", "--json")
    found = json.loads(out)
    assert found["steps"] == steps
    assert (f"18 examples: {steps} steps of" in said) == ("--max-steps" not in flags)
    evaluations = sum(row["validation_loss"] is not None for row in lines("o"))
    assert evaluations >= min(steps, 4)


def test_a_text_s_epochs_are_of_its_tokens_and_its_default_is_steps(place):
    found = summary("train", "text.txt", "--out", "o", *NEW, "--epochs", "0.5")
    tokens = len(TEXT) * 9 // 10 - 1
    assert found["steps"] == -(-tokens // (2 * 48))
    assert float(found["epochs"]) == pytest.approx(0.5, rel=0.1)
    dataset, usual = GPTDataset(TEXT, CharacterTokenizer(TEXT), 12), FitSettings()
    assert with_length(usual, dataset) == usual


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--epochs", "2", "--max-steps", "5"], "max_steps 5"),
        (["--epochs", "0"], "0.0"),
        (["--epochs", "nan"], "nan"),
        (["--epochs", "inf"], "inf"),
        (["--patience", "-1"], "-1"),
        (["--sample-every", "-2"], "-2"),
        (["--save-every", "soon"], "'soon'"),
        (["--save-every", "0"], "'0'"),
        (["--learning-rate", "inf"], "inf"),
        (["--max-skipped-steps", "0"], "max_skipped_steps is 0"),
        (["--seed", str(2**63)], str(2**63)),
    ],
)
@pytest.mark.parametrize("command", [["train"], ["finetune", "m"]])
def test_lengths_and_numbers_that_make_no_sense_are_refused(place, command, flags, part):
    assert part in called(*command, "text.txt", "--out", "o", *flags, check=1)[1]
    assert not Path("o").exists()


def test_the_first_line_is_the_base_s_loss(place):
    found = summary("finetune", "m", "text.txt", "--out", "o", *TUNED, "--max-steps", "2")
    model, tokenizer = open_model("m")
    held_out = GPTDataset(TEXT[int(0.9 * len(TEXT)) :], tokenizer, 64)
    base = evaluate(model, held_out)
    assert found["validation_loss_before"] == pytest.approx(base, rel=1e-6)
    first, *others = lines("o")
    assert (first["step"], first["loss"]) == (0, None)
    assert first["validation_loss"] == found["validation_loss_before"]
    assert [row["step"] for row in others] == [1, 2]
    assert found["best_step"] == 2
    assert found["steps"] == 2


def test_a_run_that_is_resumed_has_one_first_line(place):
    words = ["train", "text.txt", "--out", "o", *NEW, "--max-steps", "3", "--resume"]
    killed_at(1, *words)
    called(*words)
    called(*words)
    assert steps_of("o") == [0, 1, 2, 3]
    assert [line["step"] for line in lines("o", "samples.jsonl")] == [0, 3]


WORSE = ["--learning-rate", "3", "--no-muon", "--warmup-steps", "0", "--schedule", "stable"]
WORSE += ["--max-steps", "40", "--evaluate-every", "2", "--patience", "2", "--sample-every", "0"]


def test_it_stops_where_nothing_is_gained_any_more_and_keeps_the_best(place):
    found = summary("train", "text.txt", "--out", "o", *NEW, *WORSE)
    losses = {row["step"]: row["validation_loss"] for row in lines("o")[1:]}
    losses = {step: loss for step, loss in losses.items() if loss is not None}
    best = min(losses, key=losses.get)
    assert found["steps"] == best + 4 < 40
    assert found["best_step"] == best
    assert "2 evaluations" in found["ended"] and f"{best + 4} of 40" in found["ended"]
    held_out = GPTDataset(TEXT[int(0.9 * len(TEXT)) :], open_model("o")[1], 12)
    assert evaluate(open_model("o")[0], held_out) == pytest.approx(losses[best], rel=1e-6)
    again = summary("train", "text.txt", "--out", "o", *NEW, *WORSE, "--resume")
    assert (again["steps"], again["ended"]) == (found["steps"], found["ended"])


def test_resumed_it_goes_on_counting(place):
    found = summary("train", "text.txt", "--out", "whole", *NEW, *WORSE)
    killed_at(found["steps"] - 1, "train", "text.txt", "--out", "cut", *NEW, *WORSE)
    again = summary("train", "text.txt", "--out", "cut", *NEW, *WORSE, "--resume")
    assert again["steps"] == found["steps"]
    assert weights("cut") == weights("whole")


def test_patience_counts_evaluations_without_improvement():
    losses = [3.0, 2.0, 2.5, 1.9, 1.9, float("nan"), 1.0]
    since = [evaluations_since_best(losses[:count]) for count in range(len(losses) + 1)]
    assert since == [0, 0, 0, 1, 0, 1, 2, 0]


def test_a_checkpoint_comes_every_so_many_steps(place, monkeypatch):
    saved = []
    save = RunFolder.save
    monkeypatch.setattr(
        RunFolder, "save", lambda run, *a: (saved.append(a[0].step), save(run, *a))[1]
    )
    words = ["train", "text.txt", "--out", "o", *NEW, "--max-steps", "8", "--evaluate-every", "5"]
    called(*words, "--save-every", "3")
    assert saved == [3, 5, 6, 8]


def test_a_kill_loses_at_most_the_steps_since(place):
    words = ["train", "text.txt", *NEW, "--max-steps", "8", "--save-every", "3"]
    killed_at(8, *words, "--out", "cut")
    assert "going on from step 6 of 8" in called(*words, "--out", "cut", "--resume")[1]
    called(*words, "--out", "whole")
    assert weights("cut") == weights("whole")
    assert steps_of("cut") == steps_of("whole")


def test_an_interval_is_of_steps_or_of_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training, "monotonic", lambda: now[0])
    for word, seconds in {"90s": 90, "10m": 600, "2h": 7200}.items():
        interval = SaveInterval.read(word)
        now[0] += seconds - 1
        assert not interval.due(10)
        now[0] += 1
        assert interval.due(10)
        interval.saved()
        assert not interval.due(11)
    steps = SaveInterval.read("500")
    assert [n for n in (1, 499, 500, 750, 1000) if steps.due(n)] == [500, 1000]
    for word in ("", "m", "1.5m", "-3", "5x", "٣"):
        with pytest.raises(SurgeryError):
            SaveInterval.read(word)


def test_the_sample_is_the_answer_to_the_first_held_out_question(place):
    words = ["finetune", "m", "a.jsonl", "--out", "o", *TUNED, "--template", "chatml"]
    found = summary(*words, "--learning-rate", "0.05", "--epochs", "1")
    model, tokenizer = open_model("m")
    question = "<|im_start|>user\nAdd 18"
    samples = lines("o", "samples.jsonl")
    assert samples[0]["step"] == 0 and samples[-1]["step"] == found["steps"]
    assert question in samples[0]["prompt"] and "19" not in samples[0]["prompt"]
    for step, key in ((0, "sample_before"), (-1, "sample_after")):
        if step:
            load_adapter(model, "o")
        ids = generate(model, tokenizer.encode(samples[0]["prompt"]), 48, temperature=0)
        if step == 0 or found["best_step"] == found["steps"]:
            assert tokenizer.decode(list(ids)) == found[key] == samples[step]["answer"]


def test_an_empty_sample_is_said_on_its_line():
    assert one_line(" \n") == "(nothing)"
    assert one_line("a\n b ") == "a b"


def test_samples_come_as_often_as_asked_and_change_no_bit(place):
    words = ["train", "text.txt", *NEW, "--dropout", "0.1", "--max-steps", "6"]
    for every, steps in (("0", []), ("2", [0, 2, 4, 6]), (None, [0, 3, 6])):
        out = f"run{every}"
        flags = [] if every is None else ["--sample-every", every]
        called(*words, "--out", out, "--evaluate-every", "3", *flags)
        there = Path(out, "samples.jsonl").exists()
        assert [s["step"] for s in lines(out, "samples.jsonl")] == steps if there else not steps
    assert weights("run0") == weights("run2") == weights("runNone")
    losses = [[row["loss"] for row in lines(out)] for out in ("run0", "run2")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "command", [["train", "text.txt", "--init-from", "bad"], ["finetune", "bad"]]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_is_refused_by_name(place, command, value):
    model, tokenizer = open_model("m")
    with torch.no_grad():
        model.layers[1].self_attn.k_proj.weight[2, 3] = value
    save_model(model, "bad", tokenizer)
    said = called(*command, *(["text.txt"] if len(command) == 2 else []), "--out", "o", check=1)[1]
    assert "layers.1" in said and "k_proj.weight" in said
    assert not Path("o").exists()


def overflowing(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """A model in which one letter overflows, and data that holds it in some steps alone."""
    model, tokenizer = open_model("m")
    letter = tokenizer.encode("~")[0]
    with torch.no_grad():
        model.embed_tokens.weight[letter] = 3e38
    save_model(model, "far", tokenizer)
    batch = GPTDataset.batch

    def poisoned(data: GPTDataset, step: int, *more: int, **other: int) -> tuple:
        inputs, targets = batch(data, step, *more, **other)
        return (
            torch.where(inputs == inputs[0, 0], letter, inputs) if step in bad else inputs
        ), targets

    monkeypatch.setattr(GPTDataset, "batch", poisoned)


LOW = (
    "--learning-rate 1e-5 --max-steps 8 --batch-size 4 --block-size 12 --precision float32".split()
)


def test_skipped_steps_are_counted_and_resume_to_the_same_bits(place, monkeypatch):
    overflowing(monkeypatch, {2, 5})
    words = [
        "train",
        "text.txt",
        "--init-from",
        "far",
        *LOW,
        "--save-every",
        "3",
        "--sample-every",
        "0",
    ]
    found = summary(*words, "--out", "whole")
    assert found["skipped_steps"] == 2
    assert [row["step"] for row in lines("whole") if row.get("skipped")] == [3, 6]
    killed_at(4, *words, "--out", "cut")
    assert summary(*words, "--out", "cut", "--resume")["skipped_steps"] == 2
    assert weights("cut") == weights("whole")


def test_too_many_in_a_row_are_saved_and_the_end(place, monkeypatch):
    overflowing(monkeypatch, {3, 4, 5, 6, 7})
    words = ["train", "text.txt", "--init-from", "far", *LOW, "--out", "o"]
    said = called(*words, "--max-skipped-steps", "2", check=1)[1]
    assert "2 steps in a row" in said and "step 5" in said and "row" in said
    assert (Path("o") / "LATEST").read_text() == "step-00000004\n"
    assert steps_of("o") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("killed", [5, 6])  # in the midst of them
def test_the_count_of_those_in_a_row_goes_on_across_a_resume(place, monkeypatch, killed):
    overflowing(monkeypatch, {1, 3, 4, 5, 6, 7})
    words = ["train", "text.txt", "--init-from", "far", *LOW, "--out", "o", "--save-every", "1"]
    words += ["--max-skipped-steps", "4"]
    killed_at(killed, *words)
    said = called(*words, "--resume", check=1)[1]
    assert "4 steps in a row" in said and "step 7" in said
    assert "4 steps in a row" in called(*words, "--resume", check=1)[1]  # and once more
    assert steps_of("o") == [0, 1, 2, 3, 4, 5, 6]


def test_the_next_command_talks_where_answers_were_learned(place):
    words = [*TUNED, "--template", "chatml", "--max-steps", "1"]
    said = called("finetune", "m", "a.jsonl", "--out", "it s", *words)[1]
    assert said.splitlines()[-1].startswith("surgery chat m --adapter 'it s'")
    said = called("finetune", "m", "text.txt", "--out", "o2", *TUNED, "--max-steps", "1")[1]
    assert said.splitlines()[-1].startswith("surgery generate m --adapter o2")
