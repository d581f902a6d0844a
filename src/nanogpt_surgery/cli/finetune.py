"""`surgery finetune`: a LoRA for a model, on another text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.console import say, show
from nanogpt_surgery.cli.options import given, options_of, options_of_function
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.training.settings import FitSettings

LONGEST_WINDOW = 256
INJECT = "nanogpt_surgery.lora.operations:inject_lora"
LoraOptions: Any = options_of_function(INJECT, "LoRA", leave_out=("model",))
TrainingOptions: Any = options_of(FitSettings, "Training")


def finetune(
    model: str,
    *text: str,
    out: Path,
    resume: bool = False,
    block_size: int | None = None,
    lora: LoraOptions = None,
    training: TrainingOptions = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Fine-tune a model on text with LoRA, into an adapter folder that peft reads.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    text
        files, folders, or - for standard input; without any, the standard library's source
    out
        the adapter folder: the adapter, checkpoints, metrics.jsonl, loss.png
    resume
        go on with the run that is there
    block_size
        tokens in a window; the model's own by default, at most 256
    json
        print the result as JSON
    """
    import torch

    from nanogpt_surgery.cli.training_run import Job, datasets, fingerprint, run_training
    from nanogpt_surgery.data.corpus import python_source, read_texts
    from nanogpt_surgery.formats.adapter_layout import write_adapter_files
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.lora.operations import inject_lora
    from nanogpt_surgery.lora.report import Report

    settings = FitSettings(**given(training))
    network, tokenizer = open_model(model, torch.float32)  # computed in what `fit` chooses
    if tokenizer is None:
        raise SurgeryError(f"{model} has no tokenizer.json, so text cannot become ids")
    whole = read_texts(text) if text else python_source()
    window = block_size or min(network.config.block_size, LONGEST_WINDOW)
    dataset, validation = datasets(whole, tokenizer, window)
    base = fingerprint(network.state_dict().values())
    torch.manual_seed(settings.seed)
    report = inject_lora(network, **given(lora))
    say(str(report))
    job = Job(
        out=out,
        resume=resume,
        model=network,
        dataset=dataset,
        validation=validation,
        settings=settings,
        description={"kind": "finetune", "base": base, "lora": report.to_dict()},
        write_weights=lambda folder: write_adapter_files(network, folder, str(model)),
    )
    show(Report("fine-tuned", [], run_training(job)), json)
    say(f"surgery generate {model} --adapter {out} --prompt … continues a text with it")
