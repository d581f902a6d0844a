"""`surgery finetune`: a LoRA for a model, on another text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.console import say, show
from nanogpt_surgery.cli.options import given, options_of, options_of_function
from nanogpt_surgery.data.instruction_settings import InstructionSettings
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.training.settings import FitSettings

INJECT = "nanogpt_surgery.lora.operations:inject_lora"
TargetOptions: Any = options_of_function(INJECT, "LoRA", leave_out=("model", "settings"))
LoraOptions: Any = options_of(LoRASettings, "LoRA")
InstructionOptions: Any = options_of(InstructionSettings, "Instructions")
TrainingOptions: Any = options_of(FitSettings, "Training")

if TYPE_CHECKING:
    from nanogpt_surgery.data.batches import Batches
    from nanogpt_surgery.data.tokenizer import Tokenizer


def finetune(
    model: str,
    *text: str,
    out: Path,
    resume: bool = False,
    plan: Annotated[bool, Parameter(negative="")] = False,
    weights: str | None = None,
    block_size: int | None = None,
    instructions: InstructionOptions = None,
    target: TargetOptions = None,
    lora: LoraOptions = None,
    training: TrainingOptions = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Fine-tune a model on text, or on answers, with LoRA into an adapter folder that peft reads.

    JSON and JSONL files of prompts with answers, or of conversations, are instruction data: the
    answers alone are trained on.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    text
        files, folders, or - for standard input; without any, the standard library's source;
        or JSON and JSONL files of instruction data; or a folder that surgery data prepare made
    out
        the adapter folder: the adapter, checkpoints, metrics.jsonl, loss.png
    resume
        go on with the run that is there
    plan
        say what it will take, by a few real steps, and touch nothing
    weights
        draw from each source of text in proportion, as in 3:1 for two of them
    block_size
        tokens in a window, or in a row of conversations; the model's own by default, at most 256
    json
        print the result as JSON
    """
    import torch

    from nanogpt_surgery.cli.instruction_data import window
    from nanogpt_surgery.cli.sources import say_sources
    from nanogpt_surgery.cli.training_run import Job, fingerprint, planned, run_training
    from nanogpt_surgery.formats.adapter_layout import write_adapter_files
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.lora.operations import inject_lora
    from nanogpt_surgery.lora.report import Report

    settings, adapter = FitSettings(**given(training)), LoRASettings(**given(lora))
    network, tokenizer = open_model(model, torch.float32)  # computed in what `fit` chooses
    if tokenizer is None:
        raise SurgeryError(f"{model} has no tokenizer.json, so text cannot become ids")
    length = window(block_size, network.config.block_size)
    settings_of_data = InstructionSettings(**given(instructions))
    dataset, validation = _data(text, weights, tokenizer, length, settings_of_data)
    say_sources(dataset, text, settings.max_steps * settings.batch_size * settings.accumulation)
    base = fingerprint(network.state_dict().values())
    torch.manual_seed(settings.seed)
    report = inject_lora(network, **given(target), settings=adapter)
    say(str(report))
    job = Job(
        out=out,
        resume=resume,
        model=network,
        dataset=dataset,
        validation=validation,
        settings=settings,
        description={
            "kind": "finetune",
            "base": base,
            "lora": report.to_dict(),
            "adapter": adapter.to_dict(),
        },
        write_weights=lambda folder: write_adapter_files(network, folder, str(model)),
    )
    if plan:
        show(planned(job), json)
        return
    show(Report("fine-tuned", [], run_training(job)), json)
    say(f"surgery generate {model} --adapter {out} --prompt … continues a text with it")


def _data(
    paths: tuple[str, ...],
    weights: str | None,
    tokenizer: Tokenizer,
    length: int,
    settings: InstructionSettings,
) -> tuple[Batches, Batches]:
    """What to train on and what is held out: windows of text, or rows of conversations."""
    from nanogpt_surgery.cli import instruction_data
    from nanogpt_surgery.cli.sources import open_sources
    from nanogpt_surgery.cli.training_run import datasets
    from nanogpt_surgery.data.corpus import python_source

    if not instruction_data.is_instructions(paths, settings):
        if paths or weights is not None:
            return open_sources(paths, weights, tokenizer).datasets(length)
        return datasets(python_source(), tokenizer, length)
    if weights is not None:
        raise SurgeryError("--weights mixes texts, not instruction data", "name all files without")
    examples = instruction_data.read_examples(paths, tokenizer, settings)
    found = instruction_data.instruction_datasets(examples, tokenizer, length, settings)
    say(str(instruction_data.counts_of(trained_on=found[0], held_out=found[1])))
    return found
