"""`surgery train`: a model from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from nanogpt_surgery.cli.console import say, show
from nanogpt_surgery.cli.options import given, options_of
from nanogpt_surgery.model.config import FAMILIES, GPTConfig
from nanogpt_surgery.training.recipes import RECIPES
from nanogpt_surgery.training.settings import FitSettings

if TYPE_CHECKING:
    from nanogpt_surgery.cli.sources import Sources
    from nanogpt_surgery.data.tokenizer import Tokenizer

CHARACTERS = "characters"
ModelOptions: Any = options_of(GPTConfig, "Model", leave_out=("vocab_size", "rope_scaling"))
TrainingOptions: Any = options_of(FitSettings, "Training")
Family: Any = Literal[*FAMILIES]
Recipe: Any = Literal[*(name for name in RECIPES if name)]


def train(
    *text: str,
    out: Path,
    resume: bool = False,
    plan: Annotated[bool, Parameter(negative="")] = False,
    weights: str | None = None,
    tokenizer: str = CHARACTERS,
    recipe: Recipe | None = None,
    family: Annotated[Family | None, Parameter(group="Model")] = None,
    model: ModelOptions = None,
    training: TrainingOptions = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train a GPT on text, into a run folder.

    Parameters
    ----------
    text
        files, folders, or - for standard input; without any, Python's own reference;
        or a folder that surgery data prepare made
    out
        the run folder: checkpoints, metrics.jsonl, loss.png
    resume
        go on with the run that is there
    plan
        say what it will take, by a few real steps, and touch nothing
    weights
        draw from each source in proportion, as in 3:1 for two of them
    tokenizer
        a folder with a tokenizer.json, as surgery tokenizer train makes it; or characters
    recipe
        other defaults for model and training: fast is the lowest loss in little time
        (docs/training.md); with a family, for the training alone; flags still count
    family
        start from this family's axes; other flags still count
    json
        print the result as JSON
    """
    import torch

    from nanogpt_surgery.cli.sources import say_sources
    from nanogpt_surgery.cli.training_run import Job, planned, run_training
    from nanogpt_surgery.data.tokenizer import tokenizer_fingerprint, vocab_size_of
    from nanogpt_surgery.formats.model_file import write_model_files
    from nanogpt_surgery.lora.report import Report
    from nanogpt_surgery.model.initialisation import start_from_zero
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

    chosen = RECIPES[recipe]
    settings = FitSettings(**(chosen.training | given(training)))
    sources = _sources(text, weights, tokenizer)
    encoder = sources.tokenizer
    axes = {} if family else chosen.model
    config = _config(family, axes | given(model), vocab_size_of(encoder))
    dataset, validation = sources.datasets(config.block_size)
    torch.manual_seed(settings.seed)
    network = SimpleGPT.from_config(config)
    if chosen.from_zero:
        start_from_zero(network, config)
    say(
        f"{len(dataset):,} windows to train on, {len(validation):,} held out; tokens of "
        f"{config.vocab_size:,} kinds; a model of {network.n_parameters:,} parameters"
    )
    say_sources(dataset, text, settings.max_steps * settings.batch_size * settings.accumulation)
    job = Job(
        out=out,
        resume=resume,
        model=network,
        dataset=dataset,
        validation=validation,
        settings=settings,
        description={
            "kind": "train",
            "recipe": recipe,
            "model": config.to_dict(),
            "tokenizer": tokenizer_fingerprint(encoder),
        },
        write_weights=lambda folder: write_model_files(network, folder, encoder),
    )
    if plan:
        show(planned(job), json)
        return
    show(Report("trained", [], run_training(job)), json)
    say(f"surgery generate {out} --prompt … continues a text with it")


def _config(family: str | None, values: dict[str, Any], vocab_size: int) -> GPTConfig:
    if family is None:
        return GPTConfig(vocab_size=vocab_size, **values)
    return GPTConfig.for_family(family, vocab_size=vocab_size, **values)


def _sources(paths: tuple[str, ...], weights: str | None, tokenizer: str) -> Sources:
    """What to learn from, and the tokenizer that was named, or the sources' own."""
    from nanogpt_surgery.cli.sources import Sources, open_sources
    from nanogpt_surgery.data.character_tokenizer import CharacterTokenizer
    from nanogpt_surgery.data.corpus import python_reference, python_source

    found = None if tokenizer == CHARACTERS else opened_tokenizer(tokenizer)
    if paths or weights is not None:
        return open_sources(paths, weights, found)
    say("no text was named: training on Python's language reference")
    text = python_reference()
    # With the characters of the other built-in corpus, so that `finetune` can read it.
    return Sources([text], found or CharacterTokenizer(text + python_source()), None)


def opened_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer in a folder that was named.

    Raises:
        SurgeryError: there is none.
    """
    from nanogpt_surgery.errors import SurgeryError
    from nanogpt_surgery.formats.tokenizer_files import open_tokenizer

    found = open_tokenizer(folder)
    if found is None:
        there = "it holds no tokenizer.json" if Path(folder).is_dir() else "there is no such folder"
        raise SurgeryError(
            f"no tokenizer opens from {folder}: {there}",
            "surgery tokenizer train TEXT --vocab-size 4096 --out FOLDER makes one",
        )
    return found
