"""`surgery train`: a model from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from nanogpt_surgery.cli.console import say, show
from nanogpt_surgery.cli.options import given, options_of
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.training.settings import FitSettings

if TYPE_CHECKING:
    from nanogpt_surgery.data.character_tokenizer import CharacterTokenizer

ModelOptions: Any = options_of(GPTConfig, "Model", leave_out=("vocab_size", "rope_scaling"))
TrainingOptions: Any = options_of(FitSettings, "Training")
Family = Literal["gpt2", "llama", "qwen2", "qwen3"]


def train(
    *text: str,
    out: Path,
    resume: bool = False,
    family: Annotated[Family | None, Parameter(group="Model")] = None,
    model: ModelOptions = None,
    training: TrainingOptions = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train a character-level GPT on text, into a run folder.

    Parameters
    ----------
    text
        files, folders, or - for standard input; without any, Python's own reference
    out
        the run folder: checkpoints, metrics.jsonl, loss.png
    resume
        go on with the run that is there
    family
        start from this family's axes; other flags still count
    json
        print the result as JSON
    """
    from nanogpt_surgery.cli.training_run import Job, run_training
    from nanogpt_surgery.data.gpt_dataset import GPTDataset
    from nanogpt_surgery.formats.model_file import write_model_files
    from nanogpt_surgery.lora.report import Report
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

    settings = FitSettings(**given(training))
    train_text, validation_text, tokenizer = _texts(text)
    config = _config(family, given(model), tokenizer.vocab_size)
    import torch

    torch.manual_seed(settings.seed)
    network = SimpleGPT.from_config(config)
    say(
        f"{len(train_text) + len(validation_text):,} characters, {tokenizer.vocab_size} distinct; "
        f"a model of {network.n_parameters:,} parameters"
    )

    job = Job(
        out=out,
        resume=resume,
        model=network,
        dataset=GPTDataset(train_text, tokenizer, config.block_size),
        validation=GPTDataset(validation_text, tokenizer, config.block_size),
        settings=settings,
        description={"kind": "train", "model": config.to_dict()},
        write_weights=lambda folder: write_model_files(network, folder, tokenizer),
    )
    report = Report("trained", [], run_training(job))
    show(str(report), report.to_dict(), json)
    say(f"surgery generate {out} --prompt … continues a text with it")


def _config(family: str | None, values: dict[str, Any], vocab_size: int) -> GPTConfig:
    if family is None:
        return GPTConfig(vocab_size=vocab_size, **values)
    return GPTConfig.for_family(family, vocab_size=vocab_size, **values)


def _texts(paths: tuple[str, ...]) -> tuple[str, str, CharacterTokenizer]:
    """Training and validation text, and a tokenizer of all their characters."""
    from nanogpt_surgery.data.character_tokenizer import CharacterTokenizer
    from nanogpt_surgery.data.corpus import (
        python_reference,
        python_source,
        read_texts,
        split_by_position,
    )

    if paths:
        text = read_texts(paths)
        return *split_by_position(text), CharacterTokenizer(text)
    text = python_reference()
    say("no text was named: training on Python's language reference")
    # With the characters of the other built-in corpus, so that `finetune` can read it.
    return *split_by_position(text), CharacterTokenizer(text + python_source())
