"""`surgery train`: a model from nothing, or all weights of one that is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.cli.framework.options import given, options_of
from nanogpt_surgery.cli.next_command import say_next
from nanogpt_surgery.cli.run_options import RunOptions
from nanogpt_surgery.model.config import FAMILIES, GPTConfig
from nanogpt_surgery.training.recipes import MUON, RECIPES, further_values, training_values
from nanogpt_surgery.training.settings import FitSettings

if TYPE_CHECKING:
    from nanogpt_surgery.cli.sources import Sources
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.runs.training import Training

CHARACTERS = "characters"
ModelOptions: Any = options_of(GPTConfig, "Model", leave_out=("vocab_size", "rope_scaling"))
TrainingOptions: Any = options_of(FitSettings, "Training", ("lora_plus_ratio", "cache_gib"), MUON)
Family: Any = Literal[*FAMILIES]
Recipe: Any = Literal[*(name for name in RECIPES if name)]


def train(
    *text: str,
    run: RunOptions,
    base: Annotated[str | None, Parameter(name="--init-from")] = None,
    weights: Annotated[str | None, Parameter(name="--mix")] = None,
    tokenizer: Annotated[str | None, Parameter(show_default=lambda _: CHARACTERS)] = None,
    recipe: Recipe | None = None,
    family: Annotated[Family | None, Parameter(group="Model")] = None,
    model: ModelOptions = None,
    training: TrainingOptions = None,
) -> None:
    """Train a GPT on text, into a run folder.

    Muon trains its matrices, at a learning rate that suits it; with --no-muon AdamW trains all,
    and the defaults of other flags are AdamW's, those of fit and finetune. With --init-from
    AdamW trains all at a low rate, or with --muon Muon at a low one.

    Parameters
    ----------
    text
        files, folders, or - for standard input; without any, Python's own reference;
        or a folder that surgery data prepare made
    base
        go on from this model, with all of its weights: a run, a model folder, a GGUF file or a hub
        name; its tokenizer and its sizes are taken, and a --block-size may only cut shorter windows
    weights
        draw from each source in proportion, as in 3:1 for two of them
    tokenizer
        a folder with a tokenizer.json, as surgery tokenizer train makes it; or characters
    recipe
        other defaults for model and training: fast is the lowest loss in little time
        (docs/training.md); with a family, its start from zero alone; flags still count
    family
        start from this family's axes; other flags still count
    """
    from nanogpt_surgery.cli.commands.train_from import check_beside, training_from
    from nanogpt_surgery.cli.training_run import check_first, prepared

    shaped, asked = given(model), given(training)
    if base is not None:
        check_beside(base, {"tokenizer": tokenizer, "recipe": recipe, "family": family} | shaped)
    settings = FitSettings(
        **(training_values(recipe, asked) if base is None else further_values(asked))
    )
    check_first(run, settings, asked)
    if base is None:
        job = _new(settings, text, weights, tokenizer or CHARACTERS, recipe, family, shaped)
    else:
        job = training_from(base, settings, text, weights, shaped.get("block_size"))
    _carry_out(prepared(job, asked, run), run, text)


def _new(
    settings: FitSettings,
    text: tuple[str, ...],
    weights: str | None,
    tokenizer: str,
    recipe: str | None,
    family: str | None,
    shaped: dict[str, Any],
) -> Training:
    """The training of a new model, on what was named, in the shape that was asked for."""
    from nanogpt_surgery.training.checks import check_new_model

    sources = _sources(text, weights, tokenizer)
    check_new_model(_config(sources, recipe, family, shaped), settings)
    job = _job(sources, _config(sources, recipe, family, shaped), settings, recipe)
    named = {"text": text, "weights": weights, "tokenizer": tokenizer, "family": family}
    return replace(job, named=named)


def _job(
    sources: Sources,
    config: GPTConfig,
    settings: FitSettings,
    recipe: str | None,
) -> Training:
    """Its parts; its weights follow from the seed."""
    import torch

    from nanogpt_surgery.cli.sources import windows_of
    from nanogpt_surgery.model.initialisation import start_from_zero
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.runs.training import Training

    dataset, validation = sources.datasets(config.block_size)
    torch.manual_seed(settings.seed)
    network = SimpleGPT.from_config(config)
    if RECIPES[recipe].from_zero:
        start_from_zero(network, config)
    say(
        f"{windows_of(dataset, validation)}; tokens of "
        f"{config.vocab_size:,} kinds; a model of {network.n_parameters:,} parameters"
    )
    tables = config.n_prev_tokens * config.vocab_size * config.n_embd
    if 2 * tables > network.n_parameters:
        say(
            f"note: {tables:,} of them are tables of previous tokens, for so many kinds; "
            "--n-prev-tokens 0 is without"
        )
    data = dataset, validation
    known = {"recipe": recipe}
    return Training.of_model(network, sources.tokenizer, data, settings, description=known)


def _say_way(settings: FitSettings, goes_on: bool) -> None:
    """Says which optimizer trains and how fast, unless it is AdamW from nothing."""
    rate = f"at a learning rate of {settings.learning_rate:g}"
    if settings.muon:
        say(f"trained by Muon, {rate} (--no-muon: AdamW)")
    elif goes_on:
        say(f"trained by AdamW, {rate} (--muon: Muon)")


def _carry_out(job: Training, run: RunOptions, text: tuple[str, ...]) -> None:
    from nanogpt_surgery.cli.sources import say_sources
    from nanogpt_surgery.cli.training_run import carry_out

    _say_way(job.settings, "base" in job.description)
    say_sources(job.dataset, text, job.settings.windows)
    carry_out(job, run, "trained")
    if not run.plan:
        say_next(run.out)


def _config(
    sources: Sources, recipe: str | None, family: str | None, asked: dict[str, Any]
) -> GPTConfig:
    from nanogpt_surgery.data.tokenizers.tokenizer import vocab_size_of

    vocab_size = vocab_size_of(sources.tokenizer)
    if family is None:
        return GPTConfig(vocab_size=vocab_size, **(RECIPES[recipe].model | asked))
    return GPTConfig.for_family(family, vocab_size=vocab_size, **asked)


def _sources(paths: tuple[str, ...], weights: str | None, tokenizer: str) -> Sources:
    """Returns the sources to learn from, with the tokenizer that was named, or their own."""
    from nanogpt_surgery.cli.sources import named_sources

    return named_sources(
        paths, weights, None if tokenizer == CHARACTERS else opened_tokenizer(tokenizer)
    )


def opened_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer in a folder that was named.

    Raises:
        SurgeryError: there is none.
    """
    from nanogpt_surgery.errors import SurgeryError
    from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer

    found = open_tokenizer(folder)
    if found is None:
        there = "it holds no tokenizer.json" if Path(folder).is_dir() else "there is no such folder"
        raise SurgeryError(
            f"no tokenizer opens from {folder}: {there}",
            "surgery tokenizer train TEXT --vocab-size 4096 --out FOLDER makes one",
        )
    return found
