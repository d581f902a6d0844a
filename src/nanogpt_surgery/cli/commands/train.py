"""`surgery train`: a model from nothing, or all weights of one that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.cli.framework.options import given, options_of
from nanogpt_surgery.cli.model_options import CHARACTERS, named_tokenizer, next_command
from nanogpt_surgery.cli.training_run import RunOptions, carry_out, check_first, check_no_records
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.model.config import FAMILIES, GPTConfig
from nanogpt_surgery.training.recipes import MUON, RECIPES, further_values, training_values
from nanogpt_surgery.training.settings import FitSettings

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.runs.data import Sources
    from nanogpt_surgery.runs.training import Training

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
    shaped, asked = given(model), given(training)
    if base is not None:
        _check_beside(base, {"tokenizer": tokenizer, "recipe": recipe, "family": family} | shaped)
    values = training_values(recipe, asked) if base is None else further_values(asked)
    check_first(run, settings := FitSettings(**values), asked)
    check_no_records(text, base or "MODEL")
    if base is None:
        job = _new(settings, text, weights, tokenizer or CHARACTERS, recipe, family, shaped)
    else:
        job = _going_on(base, settings, text, weights, shaped.get("block_size"))
    carry_out(job, run, asked, next_command(run.out))


def _check_beside(base: str, asked: dict[str, Any]) -> None:
    """Refuses flags that the model settles itself, all at once; a block_size only cuts windows."""
    found = [
        f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        for name, value in asked.items()
        if value is not None and name != "block_size"
    ]
    if found:
        raise SurgeryError(
            f"--init-from {base} brings the model and its tokenizer, which settle "
            f"{', '.join(found)}",
            f"leave {'it' if len(found) == 1 else 'them'} out; --block-size alone may stand beside "
            "--init-from, for shorter windows",
        )


def _sources(paths: tuple[str, ...], mix: str | None, tokenizer: Tokenizer | str) -> Sources:
    """The text that was named, else Python's language reference; `tokenizer` may name a folder."""
    from nanogpt_surgery.data.text.corpus import python_reference, python_source
    from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
    from nanogpt_surgery.runs.data import Sources, open_sources

    found = named_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if paths or mix is not None:
        return open_sources(paths, mix, found)
    say("no text was named: training on Python's language reference")
    text = python_reference()
    # With the characters of the other built-in corpus, so that `finetune` can read it.
    return Sources([text], found or CharacterTokenizer(text + python_source()))


def _new(
    settings: FitSettings,
    text: tuple[str, ...],
    mix: str | None,
    tokenizer: str,
    recipe: str | None,
    family: str | None,
    shaped: dict[str, Any],
) -> Training:
    """The training of a new model, in the shape that was asked for; the seed gives its weights."""
    import torch

    from nanogpt_surgery.data.tokenizers.tokenizer import vocab_size_of
    from nanogpt_surgery.model.initialisation import start_from_zero
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.runs.training import Training
    from nanogpt_surgery.training.checks import check_new_model

    sources = _sources(text, mix, tokenizer)
    vocab_size = vocab_size_of(sources.tokenizer)
    if family is None:
        config = GPTConfig(vocab_size=vocab_size, **(RECIPES[recipe].model | shaped))
    else:
        config = GPTConfig.for_family(family, vocab_size=vocab_size, **shaped)
    check_new_model(config, settings)
    data = sources.datasets(config.block_size)
    torch.manual_seed(settings.seed)
    network = SimpleGPT.from_config(config)
    if RECIPES[recipe].from_zero:
        start_from_zero(network, config)
    size, tables = network.n_parameters, config.n_prev_tokens * vocab_size * config.n_embd
    say(f"tokens of {vocab_size:,} kinds; a model of {size:,} parameters")
    if 2 * tables > size:
        say(
            f"note: {tables:,} of them are tables of previous tokens, for so many kinds; "
            "--n-prev-tokens 0 is without"
        )
    named = {"text": text, "weights": mix, "tokenizer": tokenizer, "family": family}
    more: dict[str, Any] = {"named": named, "description": {"recipe": recipe}}
    return Training.of_model(network, sources.tokenizer, data, settings, **more)


def _going_on(
    base: str,
    settings: FitSettings,
    text: tuple[str, ...],
    mix: str | None,
    block_size: int | None,
) -> Training:
    """The training of all weights of a model, in float32, from where they are."""
    from nanogpt_surgery.runs.data import window_length
    from nanogpt_surgery.runs.training import Training, open_base

    network, tokenizer = open_base(base)
    length = window_length(block_size, network.config.block_size)
    data = _sources(text, mix, tokenizer).datasets(length)
    say(f"going on from {base}: all of its {network.n_parameters:,} parameters learn")
    named = {"model": base, "text": text, "weights": mix}
    return Training.of_model(network, tokenizer, data, settings, base, named=named)
