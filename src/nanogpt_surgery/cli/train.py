"""`surgery train`: a model from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from nanogpt_surgery.cli.console import say, show
from nanogpt_surgery.cli.options import given, options_of
from nanogpt_surgery.model.config import FAMILIES, GPTConfig
from nanogpt_surgery.training.settings import FitSettings

if TYPE_CHECKING:
    from nanogpt_surgery.data.character_tokenizer import CharacterTokenizer

ModelOptions: Any = options_of(GPTConfig, "Model", leave_out=("vocab_size", "rope_scaling"))
TrainingOptions: Any = options_of(FitSettings, "Training")
Family: Any = Literal[*FAMILIES]


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
    import torch

    from nanogpt_surgery.cli.training_run import Job, datasets, run_training
    from nanogpt_surgery.formats.model_file import write_model_files
    from nanogpt_surgery.lora.report import Report
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

    settings = FitSettings(**given(training))
    whole, tokenizer = _text(text)
    config = _config(family, given(model), tokenizer.vocab_size)
    dataset, validation = datasets(whole, tokenizer, config.block_size)
    torch.manual_seed(settings.seed)
    network = SimpleGPT.from_config(config)
    say(
        f"{len(whole):,} characters, {tokenizer.vocab_size} distinct; "
        f"a model of {network.n_parameters:,} parameters"
    )
    job = Job(
        out=out,
        resume=resume,
        model=network,
        dataset=dataset,
        validation=validation,
        settings=settings,
        description={"kind": "train", "model": config.to_dict()},
        write_weights=lambda folder: write_model_files(network, folder, tokenizer),
    )
    show(Report("trained", [], run_training(job)), json)
    say(f"surgery generate {out} --prompt … continues a text with it")


def _config(family: str | None, values: dict[str, Any], vocab_size: int) -> GPTConfig:
    if family is None:
        return GPTConfig(vocab_size=vocab_size, **values)
    return GPTConfig.for_family(family, vocab_size=vocab_size, **values)


def _text(paths: tuple[str, ...]) -> tuple[str, CharacterTokenizer]:
    """The text to learn from, and a tokenizer of all its characters."""
    from nanogpt_surgery.data.character_tokenizer import CharacterTokenizer
    from nanogpt_surgery.data.corpus import python_reference, python_source, read_texts

    if paths:
        text = read_texts(paths)
        return text, CharacterTokenizer(text)
    text = python_reference()
    say("no text was named: training on Python's language reference")
    # With the characters of the other built-in corpus, so that `finetune` can read it.
    return text, CharacterTokenizer(text + python_source())
