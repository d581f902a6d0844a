"""Trainings made from names of texts, of a recipe, of layers: all that a run needs.

training = lora_training(*open_base("m"), "m", ["talks.jsonl"], FitSettings(), LoRASettings())
with Run.begin("adapter", training) as run: …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanogpt_surgery.data.conversations.chat import named_template, to_jinja
from nanogpt_surgery.data.conversations.instruction_dataset import (
    InstructionDataset,
    split_examples,
)
from nanogpt_surgery.data.conversations.instructions import is_instruction_data, read_examples
from nanogpt_surgery.data.gpt_dataset import Batches, GPTDataset
from nanogpt_surgery.data.text import corpus
from nanogpt_surgery.data.text.mixture import Mixture
from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, vocab_size_of
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.disk_errors import free_bytes
from nanogpt_surgery.formats.peft.writing import check_unsavable
from nanogpt_surgery.lora.inject import inject_lora
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.initialisation import start_from_zero
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.runs.checkpoints import KEPT
from nanogpt_surgery.runs.data import Sources, open_sources, window_length
from nanogpt_surgery.runs.settings import DataSettings
from nanogpt_surgery.runs.training import (
    EPOCHS,
    Training,
    amount_of,
    fingerprint,
    open_base,
    with_length,
)
from nanogpt_surgery.training.checks import check_new_model, check_training, memory_for_training
from nanogpt_surgery.training.forward import can_keep
from nanogpt_surgery.training.recipes import RECIPES
from nanogpt_surgery.training.settings import FitSettings

Say = Callable[[str], object]


def new_model_training(
    text: Sequence[str],
    settings: FitSettings,
    *,
    mix: str | None = None,
    tokenizer: Tokenizer | None = None,
    recipe: str | None = None,
    family: str | None = None,
    shape: dict[str, Any] | None = None,
    say: Say = print,
    **more: Any,
) -> Training:
    """Makes a model, and the training of it on text; its weights follow from the seed.

    Args:
        text: as in `open_sources`, like `mix`; without any, Python's language reference.
        settings: of the training.
        mix: proportions of several texts.
        tokenizer: None for one of all characters.
        recipe: a name in `RECIPES`: other defaults for the model, and its start.
        family: whose axes the model has, else the recipe's.
        shape: fields of `GPTConfig`, which win.
        say: called with a line on what is made.
        **more: other fields of `Training`.

    Raises:
        SurgeryError: the text or the shape is wrong, or the memory too small for it.
    """
    sources = _sources(text, mix, tokenizer, say)
    vocab_size = vocab_size_of(sources.tokenizer)
    shape = shape or {}
    if family is None:
        config = GPTConfig(vocab_size=vocab_size, **(RECIPES[recipe].model | shape))
    else:
        config = GPTConfig.for_family(family, vocab_size=vocab_size, **shape)
    check_new_model(config, settings)
    data = sources.datasets(config.block_size)
    torch.manual_seed(settings.seed)
    model = SimpleGPT.from_config(config)
    if RECIPES[recipe].from_zero:
        start_from_zero(model, config)
    size, tables = model.n_parameters, config.n_prev_tokens * vocab_size * config.n_embd
    say(f"tokens of {vocab_size:,} kinds; a model of {size:,} parameters")
    if 2 * tables > size:
        say(
            f"note: {tables:,} of them are tables of previous tokens, for so many kinds; "
            "n_prev_tokens=0 is without"
        )
    more["description"] = {"recipe": recipe}
    return Training.of_model(model, sources.tokenizer, data, settings, **more)


def further_training(
    base: str,
    text: Sequence[str],
    settings: FitSettings,
    *,
    mix: str | None = None,
    block_size: int | None = None,
    say: Say = print,
    **more: Any,
) -> Training:
    """Opens a model, and makes the training of all its weights, in float32, from where they are.

    The arguments are those of `open_model`, `new_model_training` and `window_length`.
    """
    model, tokenizer = open_base(base)
    length = window_length(block_size, model.config.block_size)
    data = _sources(text, mix, tokenizer, say).datasets(length)
    say(f"going on from {base}: all of its {model.n_parameters:,} parameters learn")
    return Training.of_model(model, tokenizer, data, settings, base, **more)


def _sources(
    paths: Sequence[str], mix: str | None, tokenizer: Tokenizer | None, say: Say
) -> Sources:
    """The text that was named, else Python's language reference."""
    if paths or mix is not None:
        return open_sources(paths, mix, tokenizer)
    say("no text was named: training on Python's language reference")
    text = corpus.python_reference()
    # With the characters of the other built-in corpus, so that `lora_training` can read it.
    return Sources([text], tokenizer or CharacterTokenizer(text + corpus.python_source()))


def lora_training(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    base: str,
    text: Sequence[str],
    settings: FitSettings,
    adapter: LoRASettings,
    rows: DataSettings = DataSettings(),
    *,
    targets: list[str] | None = None,
    resume: bool = False,
    say: Say = print,
    show: Callable[[Report], object] = print,
) -> Training:
    """Injects a LoRA whose weights follow from the seed, and makes its training.

    Args:
        model: from `open_base`; changed.
        tokenizer: the model's.
        base: what the model was opened from.
        text: as in `open_sources`, or files of conversations; without any, Python's own source.
        settings: of the training.
        adapter: as in `inject_lora`.
        rows: how the text becomes rows.
        targets: as there; None for the usual ones.
        resume: whether it was found before that the adapter can be saved.
        say: called with a line on what goes on.
        show: called with the reports on conversations and on the injection.

    Raises:
        SurgeryError: the data, the targets or the settings are wrong.
    """
    length = window_length(rows.block_size, model.config.block_size)
    data = _lora_data(text, rows, tokenizer, length, say, show)
    base_hash = fingerprint(model.state_dict().values())
    torch.manual_seed(settings.seed)
    given = {} if targets is None else {"targets": targets}
    injected = inject_lora(model, **given, settings=adapter)
    if not resume:
        check_unsavable(model)
    show(injected)
    named = {"model": base, "text": text, "weights": rows.mix, "targets": targets}
    named |= {name: getattr(rows, name) for name in ("data", "template", "answers_only", "pack")}
    more: dict[str, Any] = {"cache_dir": rows.cache_dir, "named": named}
    if isinstance(data[0], InstructionDataset):
        more["chat_template"] = to_jinja(named_template(tokenizer, rows.template), tokenizer)
    else:
        data, more["description"] = _with_stride(data, model, settings, rows.stride, say)
    parts = model, tokenizer, data, settings, injected, adapter, base, base_hash
    return Training.of_adapter(*parts, **more)


def _lora_data(
    text: Sequence[str],
    rows: DataSettings,
    tokenizer: Tokenizer,
    length: int,
    say: Say,
    show: Callable[[Report], object],
) -> tuple[Batches, Batches]:
    """Training and held-out data: rows of conversations, or windows of text."""
    if rows.data == "instructions" or (rows.data == "auto" and is_instruction_data(text)):
        for name in ("mix", "stride"):
            if getattr(rows, name) is not None:
                raise SurgeryError(
                    f"{name} is for windows of text, not for the examples of instruction data",
                    f"leave {name} out",
                )
        examples = read_examples(text, tokenizer, rows.template, rows.answers_only)
        both = split_examples(examples, tokenizer, length, rows.pack)
        counts = [
            {"part": part, **found.counts.to_dict(), "rows": len(found) if found.packs else None}
            for part, found in zip(("trained on", "held out"), both, strict=True)
        ]
        show(Report("instruction data", counts, {}))
        return both
    if text or rows.mix is not None:
        return open_sources(text, rows.mix, tokenizer).datasets(length)
    say("no text was named: training on the source of Python's standard library")
    return Sources([corpus.python_source()], tokenizer).datasets(length)


def _with_stride(
    data: tuple[Batches, Batches],
    model: SimpleGPT,
    settings: FitSettings,
    stride: int | None,
    say: Say,
) -> tuple[tuple[Batches, Batches], dict[str, Any]]:
    """Windows to train on that begin as often as asked for, or as pays, and how often that is."""
    train, held_out = data
    assert isinstance(train, GPTDataset | Mixture)
    if stride is None and can_keep(model, settings):
        say("windows lie side by side: frozen layers see each once; stride=1 overlaps them")
        stride = train.block_size
    stride = 1 if stride is None else stride
    return (train.with_stride(stride), held_out), {"stride": stride}


def with_epochs(
    training: Training,
    epochs: float | None = None,
    patience: int = 0,
    asked: frozenset[str] = frozenset(),
    say: Say = print,
) -> Training:
    """Returns a training with the steps of so many epochs, and says what will be trained, and how.

    The arguments are those of `with_length`.
    """
    usual, data = training.settings, training.dataset
    if not isinstance(data, InstructionDataset):  # else a table has said it
        held_out: Any = training.validation
        counts = f"{len(data):,} windows to train on, {len(held_out):,} held out"
        say(f"{counts} (of {getattr(data, 'tokens', 0):,} and {held_out.tokens:,} tokens)")
    settings = with_length(usual, data, epochs, patience, asked)
    if settings.max_steps != usual.max_steps or epochs is not None:
        epochs = epochs or EPOCHS
        steps, size = settings.max_steps, settings.batch_size * settings.grad_accum_steps
        many = f"{epochs:g} epoch{'' if epochs == 1 else 's'}"
        say(f"{many} of {amount_of(data)}: {steps:,} steps of {size:,}")
    way, other = ("Muon", "muon=False: AdamW") if settings.muon else ("AdamW", "muon=True: Muon")
    say(f"trained by {way}, at a learning rate of {settings.learning_rate:g}; {other}")
    if isinstance(data, Mixture):
        for path, share in zip(training.named["text"], data.passes(settings.windows), strict=True):
            say(f"{path}: read {share:.3g} times")
    return replace(training, settings=settings, patience=patience)


def plan_run(training: Training, folder: Path) -> dict[str, Any]:
    """The memory and time that a training will take, beside what there is; as `plan_training`.

    A few of its steps are taken, and undone to the bit; the folder is not touched.
    """
    from nanogpt_surgery.training.estimates import plan_training  # which loads training/fast

    model, settings, data = training.model, training.settings, training.dataset
    check_training(model, data, settings)
    memory, disk = memory_for_training(model, settings), free_bytes(folder)
    checkpoints = KEPT + 2  # the best, and a new one before an old one goes
    summary = plan_training(model, data, settings, training.validation, checkpoints)
    return summary | {"available_bytes": memory, "free_bytes": disk}
