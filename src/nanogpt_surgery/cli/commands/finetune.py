"""`surgery finetune`: a LoRA for a model, on another text."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import AllLayers, say, say_report
from nanogpt_surgery.cli.framework.options import TargetOptions, given, options_of
from nanogpt_surgery.cli.instruction_data import InstructionSettings
from nanogpt_surgery.cli.next_command import say_next
from nanogpt_surgery.cli.run_options import RunOptions
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.training.settings import FitSettings

LoraOptions: Any = options_of(LoRASettings, "LoRA")
InstructionOptions: Any = options_of(InstructionSettings, "Instructions")
TrainingOptions: Any = options_of(FitSettings, "Training")

if TYPE_CHECKING:
    from nanogpt_surgery.data.gpt_dataset import Batches
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.runs.training import Training


def finetune(
    model: str,
    *text: str,
    run: RunOptions,
    weights: Annotated[str | None, Parameter(name="--mix")] = None,
    block_size: int | None = None,
    stride: int | None = None,
    cache_dir: Path | None = None,
    instructions: InstructionOptions = None,
    target: TargetOptions = None,
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
    weights
        draw from each source of text in proportion, as in 3:1 for two of them
    block_size
        tokens in a window of text, or of an example; the model's own by default, at most 256
    stride
        tokens from the start of one window of text to the next; by default the whole window where
        layers before the first that learns are computed once (see --cache-gib), else 1
    cache_dir
        a folder for the hidden states that are kept (--cache-gib), instead of memory
    """
    from nanogpt_surgery.cli.training_run import carry_out, prepared

    settings, adapter = FitSettings(**(asked := given(training))), LoRASettings(**given(lora))
    _check_first(run, settings, asked, cache_dir)
    network, tokenizer, length = _opened(model, block_size, given(target).get("targets") or [])
    conversations = InstructionSettings(**given(instructions))
    data = _data(text, weights, tokenizer, length, conversations)
    job = _job(run, model, network, tokenizer, data, settings, adapter, given(target), all_layers)
    job = prepared(_spaced(job, network, stride), asked, run)
    _say_training(job, text)
    named = {"model": model, "text": text, "weights": weights, **asdict(conversations)}
    named["targets"] = given(target).get("targets")
    carry_out(replace(job, cache_dir=cache_dir, named=named), run, "fine-tuned")
    _say_next(model, run, job, conversations.template)


def _say_next(model: str, run: RunOptions, job: Training, template: str) -> None:
    """Say the command that shows what was learned."""
    from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset

    if run.plan:
        return
    talks = isinstance(job.dataset, InstructionDataset)
    say_next(model, run.out, talks=talks, template=template)


def _check_first(
    run: RunOptions, settings: FitSettings, asked: dict[str, Any], cache_dir: Path | None
) -> None:
    """Raises what can be known to be wrong before anything is read."""
    from nanogpt_surgery.cli.training_run import check_first

    check_first(run, settings, asked)
    if cache_dir is not None and cache_dir.exists() and not cache_dir.is_dir():
        raise SurgeryError(f"{cache_dir} is a file", "--cache-dir names a folder")


def _opened(
    model: str, block_size: int | None, targets: list[str]
) -> tuple[SimpleGPT, Tokenizer, int]:
    """A model in float32, its tokenizer, and the tokens of a window, when no target is a text."""
    import torch

    from nanogpt_surgery.cli.instruction_data import window
    from nanogpt_surgery.data.tokenizers.tokenizer import required_tokenizer
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.model.finite import check_finite_weights

    network, found = open_model(model, torch.float32)  # computed in what `fit` chooses
    check_finite_weights(network, model)
    tokenizer = required_tokenizer(found, model)
    _check_paths(network, targets)
    return network, tokenizer, window(block_size, network.config.block_size)


def _say_training(job: Training, text: tuple[str, ...]) -> None:
    """How much there is to train on, and how fast it is learned."""
    from nanogpt_surgery.cli.sources import say_sources, say_windows

    say_windows(job.dataset, job.validation)
    say_sources(job.dataset, text, job.settings.windows)
    way = "Muon" if job.settings.muon else "AdamW"
    say(f"trained by {way}, at a learning rate of {job.settings.learning_rate:g}")


def _check_paths(model: SimpleGPT, targets: list[str]) -> None:
    """Refuse texts that were taken for targets, because they stand behind them."""
    for target in targets:
        path, layers = Path(target), (name for name, _ in model.named_modules())
        if path.exists() and not any(f".{name}".endswith(f".{target}") for name in layers):
            kind = "folder" if path.is_dir() else "file"
            raise SurgeryError(
                f"{target} is a {kind}, and stands among the targets",
                f"put the text before --targets: surgery finetune MODEL {target} … --targets …",
            )


def _job(
    run: RunOptions,
    model: str,
    network: SimpleGPT,
    tokenizer: Tokenizer,
    data: tuple[Batches, Batches],
    settings: FitSettings,
    adapter: LoRASettings,
    targets: dict[str, Any],
    all_layers: bool,
) -> Training:
    """The training of a LoRA, whose weights follow from the seed, in an opened model."""
    import torch

    from nanogpt_surgery.formats.peft.adapter_layout import check_unsavable
    from nanogpt_surgery.lora.inject import inject_lora
    from nanogpt_surgery.runs.training import Training, fingerprint

    base = fingerprint(network.state_dict().values())
    torch.manual_seed(settings.seed)
    report = inject_lora(network, **targets, settings=adapter)
    say_report(report, all_layers)
    if not run.resume:
        check_unsavable(network)
    return Training.of_adapter(network, tokenizer, data, settings, report, adapter, model, base)


def _spaced(job: Training, network: SimpleGPT, stride: int | None) -> Training:
    """The windows of a text, begun as often as asked for, or as pays."""
    from nanogpt_surgery.data.gpt_dataset import GPTDataset
    from nanogpt_surgery.data.text.mixture import Mixture
    from nanogpt_surgery.training.trainable_stages import can_keep

    data = job.dataset
    if not isinstance(data, GPTDataset | Mixture):
        if stride is not None:
            raise SurgeryError(
                "instruction data is examples, not windows of text", "leave --stride out"
            )
        return job
    if stride is None and can_keep(network, job.settings):
        say("windows lie side by side: frozen layers see each once; --stride 1 overlaps them")
        stride = data.block_size
    stride = 1 if stride is None else stride
    known = job.description | {"stride": stride}
    return replace(job, dataset=data.with_stride(stride), description=known)


def _data(
    paths: tuple[str, ...],
    weights: str | None,
    tokenizer: Tokenizer,
    length: int,
    settings: InstructionSettings,
) -> tuple[Batches, Batches]:
    """Returns training and held-out data: windows of text, or rows of conversations."""
    from nanogpt_surgery.cli import instruction_data
    from nanogpt_surgery.cli.sources import open_sources, text_datasets
    from nanogpt_surgery.data.text.corpus import python_source

    if not instruction_data.is_instructions(paths, settings):
        if paths or weights is not None:
            return open_sources(paths, weights, tokenizer).datasets(length)
        say("no text was named: training on the source of Python's standard library")
        return text_datasets(python_source(), tokenizer, length)
    if weights is not None:
        raise SurgeryError("--mix mixes texts, not instruction data", "name all files without")
    examples = instruction_data.read_examples(paths, tokenizer, settings)
    found = instruction_data.instruction_datasets(examples, tokenizer, length, settings)
    say_report(instruction_data.counts_of(trained_on=found[0], held_out=found[1]))
    instruction_data.say_left_out(found[0])
    return found
