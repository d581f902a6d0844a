"""`surgery train` and `finetune`: all weights of a model, or a LoRA, into a run folder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from nanogpt_surgery.cli.commands.data import check_no_records, named_tokenizer
from nanogpt_surgery.cli.framework.app import typed_command
from nanogpt_surgery.cli.framework.console import (
    is_distributed,
    is_main_process,
    say,
    say_from_library,
    say_report,
    show,
)
from nanogpt_surgery.cli.framework.options import (
    CHARACTERS,
    TOKENIZER,
    AllLayers,
    TargetOptions,
    given,
    next_command,
    options_of,
)
from nanogpt_surgery.cli.framework.signals import signals
from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.memory import is_out_of_memory
from nanogpt_surgery.model.config import FAMILIES, GPTConfig
from nanogpt_surgery.report import Report
from nanogpt_surgery.runs.settings import DataSettings
from nanogpt_surgery.training.recipes import MUON, RECIPES, further_values, training_values
from nanogpt_surgery.training.settings import FitSettings
from nanogpt_surgery.values import SIZE_OR_0, raise_all, wrong_values

if TYPE_CHECKING:
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.runs.training import Training

ModelOptions: Any = options_of(GPTConfig, "Model", leave_out=("vocab_size", "rope_scaling"))
TrainOptions: Any = options_of(FitSettings, "Training", ("lora_plus_ratio", "cache_gib"), MUON)
Family: Any = Literal[*FAMILIES]
Recipe: Any = Literal[*(name for name in RECIPES if name)]
MIX = "draw from each source in proportion, as in 3:1 for two of them"
OF_CHARACTERS = Parameter(help=TOKENIZER, show_default=lambda _: CHARACTERS)
LoraOptions: Any = options_of(LoRASettings, "LoRA")
OF_TEXT = ("mix", "block_size", "stride", "cache_dir")
OF_TALKS = ("data", "template", "answers_only", "pack")
TextOptions: Any = options_of(DataSettings, "Parameters", leave_out=OF_TALKS)
InstructionOptions: Any = options_of(DataSettings, "Instructions", leave_out=OF_TEXT)
FinetuneOptions: Any = options_of(FitSettings, "Training")


@Parameter(name="*")
@dataclass(frozen=True)
class RunOptions:
    """Where a training goes, and whether it begins: the flags that `train` and `finetune` share."""

    out: Path
    """the folder to make: what was trained, checkpoints, metrics.jsonl, loss.png"""
    resume: Annotated[bool, Parameter(negative="--no-resume")] = False
    """go on with the run that is there"""
    strict: bool = False
    """with --resume: stop where the newest checkpoint is damaged, instead of passing over it"""
    allow_changes: bool = False
    """with --resume: go on although settings, data or tokenizer differ, and say in what"""
    epochs: float | None = None
    """passes over the data, in the place of --max-steps; 3 for instruction data by default"""
    patience: int = 0
    """evaluations in a row without improvement after which the training stops (0: never)"""
    save_every: str = "10m"
    """steps (500) or time (90s, 10m, 2h) from one checkpoint to the next, beside evaluations'"""
    sample_every: int | None = None
    """steps from one sample answer to the next; by default at evaluations (0: none)"""
    plan: bool = False
    """say what it will take, by a few real steps, and touch nothing"""
    json: bool = False
    """print the result as JSON"""


def train(
    *text: str,
    run: RunOptions,
    base: Annotated[str | None, Parameter(name="--init-from")] = None,
    mix: Annotated[str | None, Parameter(help=MIX)] = None,
    tokenizer: Annotated[str | None, OF_CHARACTERS] = None,
    recipe: Recipe | None = None,
    family: Annotated[Family | None, Parameter(group="Model")] = None,
    model: ModelOptions = None,
    training: TrainOptions = None,
) -> None:
    """Train a GPT on text, into a run folder.

    Muon trains its matrices, at a learning rate that suits it; with --no-muon AdamW trains all,
    and the defaults of other flags are AdamW's, those of fit and finetune. With --init-from
    AdamW trains all at a low rate, or with --muon Muon at a low one.

    Args:
        text: files, folders, or - for standard input; without any, Python's own reference; or a
            folder that surgery data prepare made
        base: go on from this model, with all of its weights: a run, a model folder, a GGUF file or
            a hub name; its tokenizer and its sizes are taken, and a --block-size may only cut
            shorter windows
        recipe: other defaults for model and training: fast is the lowest loss in little time
            (docs/training.md); with a family, its start from zero alone; flags still count
        family: start from this family's axes; other flags still count
    """
    from nanogpt_surgery.runs.from_names import further_training, new_model_training

    shaped, asked = given(model), given(training)
    if base is not None:
        _check_beside(base, {"tokenizer": tokenizer, "recipe": recipe, "family": family} | shaped)
    values = training_values(recipe, asked) if base is None else further_values(asked)
    check_first(run, settings := FitSettings(**values), asked)
    check_no_records(text, base or "MODEL")
    more: dict[str, Any] = {"mix": mix, "say": say_from_library}
    named = {"text": text, "weights": mix}
    if base is None:
        tokenizer = tokenizer or CHARACTERS
        more |= {"tokenizer": named_tokenizer(tokenizer), "recipe": recipe, "family": family}
        more["named"] = named | {"tokenizer": tokenizer, "family": family}
        job = new_model_training(text, settings, shape=shaped, **more)
    else:
        more |= {"block_size": shaped.get("block_size"), "named": {"model": base} | named}
        job = further_training(base, text, settings, **more)
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


def finetune(
    model: str,
    *text: str,
    run: RunOptions,
    options: TextOptions = None,
    instructions: InstructionOptions = None,
    target: TargetOptions | None = None,
    lora: LoraOptions = None,
    training: FinetuneOptions = None,
    all_layers: AllLayers = False,
) -> None:
    """Fine-tune a model on text, or on answers, with LoRA into an adapter folder that peft reads.

    JSON, JSONL, CSV and TSV files of questions with answers, or of conversations, are instruction
    data: the answers alone are trained on.

    Args:
        model: a run, a model folder, a GGUF file or a hub name
        text: files, folders, or - for standard input, or a folder that surgery data prepare made;
            without any, the standard library's source
    """
    from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset
    from nanogpt_surgery.runs.from_names import lora_training
    from nanogpt_surgery.runs.training import open_base

    settings, adapter = FitSettings(**(asked := given(training))), LoRASettings(**given(lora))
    rows, targets = DataSettings(**given(options), **given(instructions)), given(target)
    check_first(run, settings, asked)
    if (place := rows.cache_dir) is not None and place.exists() and not place.is_dir():
        raise SurgeryError(f"{place} is a file", "--cache-dir names a folder")
    network, tokenizer = open_base(model)
    _check_paths(network, targets.get("targets") or [])
    job = lora_training(
        network,
        tokenizer,
        model,
        text,
        settings,
        adapter,
        rows,
        **targets,
        resume=run.resume,
        say=say_from_library,
        show=lambda report: say_report(report, all_layers),
    )
    talks = isinstance(job.dataset, InstructionDataset)
    carry_out(job, run, asked, next_command(model, run.out, talks=talks))


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


def check_first(options: RunOptions, settings: FitSettings, asked: dict[str, Any]) -> None:
    """Raises what can be refused before anything is read: the folder, the device, the length.

    Raises:
        SurgeryError: the device is not there, no run can begin or go on in the folder, or the run's
            options contradict each other or the settings that were `asked` for.
    """
    from nanogpt_surgery.formats.folders.run_folder import checkpoints
    from nanogpt_surgery.runs.run import check_run
    from nanogpt_surgery.runs.training import SaveInterval, check_epochs
    from nanogpt_surgery.training.hardware import choose_hardware

    check_epochs(options.epochs, asked.get("max_steps"))
    counts = {"patience": options.patience, "sample_every": options.sample_every or 0}
    raise_all(wrong_values(SIZE_OR_0, counts))
    SaveInterval.read(options.save_every)
    choose_hardware(settings)
    if options.plan and is_distributed():
        raise SurgeryError("a plan is made by one process", "run it without torchrun")
    if not options.plan:
        check_run(options.out, settings, options.resume)
        if options.resume and not checkpoints(options.out):
            say(f"note: there is no checkpoint in {options.out}: --resume begins at step 0")


def carry_out(
    training: Training, options: RunOptions, asked: dict[str, Any], following: str
) -> None:
    """Trains to the end, or to a signal, and reports it; with --plan, says what that takes.

    `asked` are the settings given on the command line, `following` is the command to type next.
    """
    from nanogpt_surgery.runs.from_names import plan_run, with_epochs
    from nanogpt_surgery.runs.progress import progress
    from nanogpt_surgery.runs.run import Run

    training = with_epochs(
        training, options.epochs, options.patience, frozenset(asked), say_from_library
    )
    training = replace(training, save_every=options.save_every, sample_every=options.sample_every)
    with _explained(training, options):
        if options.plan:
            say("timing a few steps and an evaluation")
            show(Report("training planned", [], plan_run(training, options.out)), options.json)
            say("the same command without --plan trains it")
            return
        begun = Run.begin(
            options.out,
            training,
            resume=options.resume,
            strict=options.strict,
            allow_changes=options.allow_changes,
            typed=typed_command(),
            say=say,
        )
        on_terminal = sys.stderr.isatty() and is_main_process()
        with begun as run, signals(run.stop), progress(run, say, on_terminal) as show_step:
            for step in run.train():
                show_step(step)
                last = step.step
            if run.stopped:
                place = options.out
                say(f"saved after step {last:,} in {place}; the same command with --resume goes on")
                sys.exit(128 + run.stopped)
            done = {"train": "trained", "finetune": "fine-tuned"}[training.description["kind"]]
            show(Report(done, [], run.finish()), options.json)
    say(following)


@contextmanager
def _explained(training: Training, options: RunOptions) -> Iterator[None]:
    """Adds to errors of the block which command began the run, or what to lower for memory."""
    from nanogpt_surgery.formats.folders.run_folder import checkpoints
    from nanogpt_surgery.runs.description import RunDiffersError

    try:
        yield
    except RunDiffersError as error:
        if not (typed := (error.before.get("typed") or {}).get("arguments")):
            raise
        hint = f"it was begun with: surgery {shlex.join(typed)}; or take a new --out"
        raise SurgeryError(error.what, hint) from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        kept = "" if options.plan else "; there is no checkpoint yet"
        if not options.plan and (found := checkpoints(options.out)):
            kept = f"; the last checkpoint is {found[-1]}, from which --resume goes on"
        raise SurgeryError(
            f"memory ran out: {quoted(str(error).partition(chr(10))[0])}{kept}",
            f"lower --batch-size from {training.settings.batch_size} (--grad-accum-steps makes up "
            "for it) or --block-size, or add --gradient-checkpointing; --plan says what each takes",
        ) from error
