"""Trainings by the names of texts: a notebook gets, to the bit, what the commands make."""

from pathlib import Path

import pytest
from helpers.commands import called

from nanogpt_surgery import FitSettings, SurgeryError
from nanogpt_surgery.files.atomic import file_hash
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.runs.from_names import lora_training, new_model_training
from nanogpt_surgery.runs.progress import progress
from nanogpt_surgery.runs.run import Run
from nanogpt_surgery.runs.settings import DataSettings
from nanogpt_surgery.runs.training import open_base
from nanogpt_surgery.training.recipes import training_values

SHAPE = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 12}
STEPS = {"max_steps": 2, "batch_size": 3, "device": "cpu", "compile": "off"}


def flags(**values: object) -> list[object]:
    return [word for name, v in values.items() for word in (f"--{name.replace('_', '-')}", v)]


def test_a_notebook_trains_as_the_commands_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be, or not to be: that is the question.\n" * 20)
    called("train", "text.txt", "--out", "m", *flags(**SHAPE, **STEPS))
    called("finetune", "m", "text.txt", "--out", "a", *flags(**STEPS, rank=2, stride=5))
    said: list[str] = []
    settings = FitSettings(**training_values(None, STEPS))
    made = new_model_training(["text.txt"], settings, shape=SHAPE, say=said.append)
    with Run.begin("m2", made) as run, progress(run, said.append, on_terminal=False) as show:
        for step in run.train():
            show(step)
    assert file_hash(Path("m2/model.safetensors")) == file_hash(Path("m/model.safetensors"))
    assert f"{made.model.n_parameters:,}" in " ".join(said)
    network, tokenizer = open_base("m")
    asked = FitSettings(**STEPS), LoRASettings(rank=2), DataSettings(stride=5)
    shown: list[object] = []
    made = lora_training(network, tokenizer, "m", ["text.txt"], *asked, show=shown.append)
    assert len(shown) == 1, "the injection"
    with Run.begin("a2", made) as run:
        assert len(list(run.train())) == 2
    name = "adapter_model.safetensors"
    assert file_hash(Path("a2", name)) == file_hash(Path("a", name))


@pytest.mark.parametrize("name", ["mix", "stride"])
def test_what_is_for_text_is_refused_for_conversations(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be, or not to be: that is the question.\n" * 20)
    Path("talks.jsonl").write_text('{"prompt": "a?", "completion": "b"}\n' * 12)
    made = new_model_training(["text.txt"], FitSettings(), shape=SHAPE, say=lambda _: None)
    rows = DataSettings(**{name: "1" if name == "mix" else 2})
    with pytest.raises(SurgeryError, match=name):
        lora_training(
            made.model, made.tokenizer, "m", ["talks.jsonl"], FitSettings(), LoRASettings(), rows
        )
