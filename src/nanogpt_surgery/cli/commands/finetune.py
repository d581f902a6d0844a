"""`surgery finetune`: a LoRA for a model, on another text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import AllLayers, say, say_report
from nanogpt_surgery.cli.framework.options import TargetOptions, given, options_of
from nanogpt_surgery.cli.model_options import InstructionSettings, next_command
from nanogpt_surgery.cli.training_run import RunOptions, carry_out, check_first
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.training.settings import FitSettings

if TYPE_CHECKING:
    from nanogpt_surgery.data.gpt_dataset import Batches
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.report import Report

    Data = tuple[Batches, Batches]

LoraOptions: Any = options_of(LoRASettings, "LoRA")
InstructionOptions: Any = options_of(InstructionSettings, "Instructions")
TrainingOptions: Any = options_of(FitSettings, "Training")


@Parameter(name="*")
@dataclass(frozen=True)
class DataOptions:
    """How text, or conversations, become windows."""

    weights: Annotated[str | None, Parameter(name="--mix")] = None
    """draw from each source of text in proportion, as in 3:1 for two of them"""
    block_size: int | None = None
    """tokens in a window of text, or of an example; the model's own by default, at most 256"""
    stride: int | None = None
    """tokens from the start of one window of text to the next; by default the whole window where
    layers before the first that learns are computed once (see --cache-gib), else 1"""
    cache_dir: Path | None = None
    """a folder for the hidden states that are kept (--cache-gib), instead of memory"""


DEFAULT_DATA = DataOptions()


def finetune(
    model: str,
    *text: str,
    run: RunOptions,
    options: DataOptions = DEFAULT_DATA,
    instructions: InstructionOptions = None,
    target: TargetOptions | None = None,
    lora: LoraOptions = None,
    training: TrainingOptions = None,
    all_layers: AllLayers = False,
) -> None:
    """Fine-tune a model on text, or on answers, with LoRA into an adapter folder that peft reads.

    JSON, JSONL, CSV and TSV files of questions with answers, or of conversations, are instruction
    data: the answers alone are trained on.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    text
        files, folders, or - for standard input, or a folder that surgery data prepare made; without
        any, the standard library's source
    """
    from nanogpt_surgery.data.conversations.chat import named_template, to_jinja
    from nanogpt_surgery.runs.data import window_length
    from nanogpt_surgery.runs.training import Training, fingerprint, open_base

    settings, adapter = FitSettings(**(asked := given(training))), LoRASettings(**given(lora))
    reading, targets = InstructionSettings(**given(instructions)), given(target)
    _check_first(run, settings, asked, options.cache_dir)
    network, tokenizer = open_base(model)
    _check_paths(network, targets.get("targets") or [])
    length = window_length(options.block_size, network.config.block_size)
    data, talks = _data(text, options, tokenizer, length, reading)
    base = fingerprint(network.state_dict().values())
    report = _injected(network, targets, adapter, settings.seed, run.resume)
    say_report(report, all_layers)
    data, spaced = (data, {}) if talks else _with_stride(data, network, settings, options.stride)
    named = {"model": model, "text": text, "weights": options.weights, **asdict(reading)}
    named["targets"] = targets.get("targets")
    more: dict[str, Any] = {"description": spaced, "cache_dir": options.cache_dir}
    parts = network, tokenizer, data, settings, report, adapter, model, base
    if talks:
        more["chat_template"] = to_jinja(named_template(tokenizer, reading.template), tokenizer)
    following = next_command(model, run.out, talks=talks)
    carry_out(Training.of_adapter(*parts, named=named, **more), run, asked, following)


def _check_first(
    run: RunOptions, settings: FitSettings, asked: dict[str, Any], cache_dir: Path | None
) -> None:
    """Raises what can be known to be wrong before anything is read."""
    check_first(run, settings, asked)
    if cache_dir is not None and cache_dir.exists() and not cache_dir.is_dir():
        raise SurgeryError(f"{cache_dir} is a file", "--cache-dir names a folder")


def _check_paths(model: SimpleGPT, targets: list[str]) -> None:
    """Refuses texts that were taken for targets, because they stand behind them."""
    for target in targets:
        path, layers = Path(target), (name for name, _ in model.named_modules())
        if path.exists() and not any(f".{name}".endswith(f".{target}") for name in layers):
            kind = "folder" if path.is_dir() else "file"
            raise SurgeryError(
                f"{target} is a {kind}, and stands among the targets",
                f"put the text before --targets: surgery finetune MODEL {target} … --targets …",
            )


def _data(
    paths: tuple[str, ...],
    options: DataOptions,
    tokenizer: Tokenizer,
    length: int,
    settings: InstructionSettings,
) -> tuple[Data, bool]:
    """Training and held-out data, and whether they are rows of conversations; else windows."""
    from nanogpt_surgery.data.conversations.instructions import is_instruction_data
    from nanogpt_surgery.data.text.corpus import python_source
    from nanogpt_surgery.runs.data import Sources, open_sources

    if settings.data == "instructions" or (settings.data == "auto" and is_instruction_data(paths)):
        if options.weights is not None:
            raise SurgeryError("--mix mixes texts, not instruction data", "name all files without")
        if options.stride is not None:
            raise SurgeryError(
                "instruction data is examples, not windows of text", "leave --stride out"
            )
        return _conversations(paths, tokenizer, length, settings), True
    if paths or options.weights is not None:
        return open_sources(paths, options.weights, tokenizer).datasets(length), False
    say("no text was named: training on the source of Python's standard library")
    return Sources([python_source()], tokenizer).datasets(length), False


def _conversations(
    paths: tuple[str, ...], tokenizer: Tokenizer, length: int, settings: InstructionSettings
) -> Data:
    """Rows of conversations; a table says how many there are."""
    from nanogpt_surgery.data.conversations.instruction_dataset import split_examples
    from nanogpt_surgery.data.conversations.instructions import read_examples
    from nanogpt_surgery.report import Report

    examples = read_examples(paths, tokenizer, settings.template, settings.answers_only)
    data = split_examples(examples, tokenizer, length, settings.pack)
    rows = [
        {"part": part, **found.counts.to_dict(), "rows": len(found) if found.packs else None}
        for part, found in zip(("trained on", "held out"), data, strict=True)
    ]
    say_report(Report("instruction data", rows, {}))
    return data


def _injected(
    model: SimpleGPT, targets: dict[str, Any], adapter: LoRASettings, seed: int, resume: bool
) -> Report:
    """Injects a LoRA whose weights follow from the seed; it must be one that can be saved."""
    import torch

    from nanogpt_surgery.formats.peft.writing import check_unsavable
    from nanogpt_surgery.lora.inject import inject_lora

    torch.manual_seed(seed)
    report = inject_lora(model, **targets, settings=adapter)
    if not resume:
        check_unsavable(model)
    return report


def _with_stride(
    data: Data, model: SimpleGPT, settings: FitSettings, stride: int | None
) -> tuple[Data, dict[str, Any]]:
    """Windows to train on that begin as often as asked for, or as pays, and how often that is."""
    from nanogpt_surgery.data.gpt_dataset import GPTDataset
    from nanogpt_surgery.data.text.mixture import Mixture
    from nanogpt_surgery.training.forward import can_keep

    train, held_out = data
    assert isinstance(train, GPTDataset | Mixture)
    if stride is None and can_keep(model, settings):
        say("windows lie side by side: frozen layers see each once; --stride 1 overlaps them")
        stride = train.block_size
    stride = 1 if stride is None else stride
    return (train.with_stride(stride), held_out), {"stride": stride}
