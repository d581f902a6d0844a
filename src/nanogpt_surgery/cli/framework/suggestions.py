"""Names of other programs for what is here: near in meaning, where spelling does not help.

Flags stand in the order in which they are looked for: the first that the command at hand
has is suggested. A key of a config file is the flag without its hyphens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from cyclopts import CycloptsError, MissingArgumentError, UnknownCommandError, UnknownOptionError

from nanogpt_surgery.errors import SurgeryError, nearest

_FLAGS: Mapping[tuple[str, ...], str] = {
    ("--learning-rate",): "lr rate max-lr peak-lr base-lr",
    ("--final-learning-rate",): "min-lr lr-end lr-min final-lr",
    ("--schedule",): "lr-scheduler-type lr-scheduler scheduler lr-schedule lr-decay-style",
    ("--warmup-steps",): "warmup warmup-iters warmup-ratio num-warmup-steps lr-warmup-steps",
    ("--weight-decay",): "wd decay l2",
    ("--max-grad-norm",): "clip grad-clip gradient-clip gradient-clipping clip-grad clip-grad-norm "
    "gradient-clip-val max-norm",
    ("--batch-size",): "bs batch per-device-train-batch-size per-device-batch-size "
    "micro-batch-size train-batch-size device-batch-size per-device-eval-batch-size mbs",
    ("--grad-accum-steps",): "gradient-accumulation-steps accumulation gradient-accumulation "
    "grad-accum grad-accumulation accum-steps accumulation-steps grad-accumulation-steps ga",
    ("--epochs", "--max-steps"): "num-train-epochs num-epochs n-epochs epoch nb-epochs",
    ("--max-steps",): "iters max-iters num-steps n-steps steps total-steps num-iterations "
    "num-training-steps train-iters",
    ("--patience",): "early-stopping early-stopping-patience early-stop",
    ("--evaluate-every",): "eval-steps eval-interval eval-every eval-freq evaluation-steps "
    "steps-per-eval validate-every val-every",
    ("--evaluate-tokens",): "eval-iters eval-batches max-eval-samples val-batches eval-tokens",
    ("--save-every", "--evaluate-every"): "save-steps save-interval checkpoint-every "
    "checkpoint-interval ckpt-interval save-freq save-strategy",
    ("--sample-every",): "generate-every sample-steps sample-interval",
    ("--muon",): "optim optimizer optimiser",
    ("--beta1",): "adam-beta1",
    ("--beta2",): "adam-beta2",
    ("--lora-plus-ratio",): "loraplus-lr-ratio loraplus",
    ("--precision", "--dtype"): "bf16 fp16 fp32 half mixed-precision amp torch-dtype weights-dtype "
    "float16 bfloat16 autocast",
    ("--dtype",): "load-in-4bit load-in-8bit",
    ("--gradient-checkpointing",): "grad-checkpoint activation-checkpointing recompute "
    "checkpoint-activations",
    ("--device",): "cuda gpu use-cpu no-cuda cpu accelerator device-map",
    ("--compile",): "torch-compile use-compile",
    ("--seed",): "random-seed manual-seed random-state data-seed",
    ("--rank",): "r lora-r lora-rank lora-dim",
    ("--alpha",): "lora-alpha lora-scale",
    ("--dropout",): "lora-dropout attn-dropout attention-dropout resid-dropout hidden-dropout",
    ("--targets",): "target-modules lora-target lora-targets lora-target-modules modules "
    "lora-modules target-layers all-linear",
    ("--dora",): "use-dora weight-decompose",
    ("--rslora",): "use-rslora",
    ("--pissa",): "use-pissa init-lora-weights",
    ("--out",): "o output-dir output out-dir outdir outfile save-dir output-path save-path "
    "save-to output-file logging-dir checkpoint-dir run-dir save-model",
    ("--overwrite",): "overwrite-output-dir f yes y replace",
    ("--resume",): "resume-from-checkpoint continue resume-from load-checkpoint auto-resume",
    ("--init-from", "--adapter"): "from pretrained finetune-from base-model checkpoint ckpt",
    ("--block-size", "--context"): "max-length max-seq-length max-seq-len seq-len seq-length "
    "sequence-length sequence-len context-length context-size ctx-size ctx n-ctx cutoff-len c "
    "model-max-length max-position-embeddings window max-source-length",
    ("--max-new-tokens",): "max-tokens max-length n-predict n num-predict num-tokens n-tokens "
    "length max-output-tokens max-gen-len max-gen-toks",
    ("--temperature",): "temp t",
    ("--repetition-penalty",): "repeat-penalty rep-pen repetition",
    ("--stop",): "stop-sequence stop-sequences stop-string stop-strings stop-words eos r "
    "reverse-prompt",
    ("--samples",): "num-return-sequences num-samples n-samples num-sequences best-of",
    ("--prompts",): "prompt-file prompts-file input-file",
    ("--prompt",): "p text input",
    ("--system",): "system-prompt sys system-message",
    ("--template",): "chat-template prompt-template prompt-format",
    ("--adapter",): "lora lora-path adapter-path adapters peft peft-model adapter-name-or-path "
    "lora-weights lora-adapter",
    ("--format",): "output-format outtype quant quantization quantize form type q qtype ftype "
    "save-method",
    ("--held-out",): "val-split test-size val-size validation-split test-split split val-set-size",
    ("--workers",): "num-workers num-proc j jobs threads processes preprocessing-num-workers",
    ("--tokenizer",): "tokenizer-name tokenizer-path tokenizer-dir vocab",
    ("--vocab-size",): "vocab num-tokens n-vocab vocabulary-size",
    ("--mix",): "weights mixture interleave-probs data-weights proportions",
    ("--answers-only",): "train-on-inputs train-on-prompt mask-prompt completion-only-loss "
    "train-on-completions assistant-only-loss",
    ("--pack",): "packing sample-packing",
    ("--n-embd",): "hidden-size d-model dim embed-dim embedding-size width n-dim model-dim",
    ("--n-layer",): "num-layers num-hidden-layers layers depth n-blocks num-blocks",
    ("--n-head",): "num-heads num-attention-heads heads nhead",
    ("--n-kv-head",): "num-key-value-heads num-kv-heads kv-heads n-query-groups",
    ("--n-inner",): "intermediate-size ffn-dim d-ff ffn-hidden-size dim-feedforward mlp-dim",
    ("--tie-head",): "tie-word-embeddings tie-weights tied",
    ("--rope-theta",): "rope-base rope-freq-base rotary-base",
    ("--norm-eps",): "layer-norm-eps rms-norm-eps eps",
    ("--family",): "arch architecture model-type",
    ("--plan",): "dry-run estimate dryrun n-dry",
    ("--json",): "output-json as-json",
    ("--data",): "dataset-format data-format",
    ("--probe",): "imatrix calibration calibration-data calibration-file",
}
_COMMANDS: Mapping[str, str] = {
    "finetune": "ft lora sft tune fine-tune peft adapt lora-finetune finetune-lora qlora instruct",
    "train": "pretrain pre-train fit learn",
    "generate": "run infer inference sample complete completion predict text",
    "chat": "serve talk converse repl interactive server webui",
    "eval": "test validate perplexity ppl benchmark bench score measure lm-eval",
    "inspect": "show info describe tree print summary ls cat view stats",
    "merge": "fuse merge-lora bake combine merge-and-unload",
    "export": "convert quantize quantise save gguf to-gguf convert-to-gguf package upload",
    "undo": "revert restore rollback unmerge reset",
    "log": "history journal",
    "tokenizer": "tokenize tokenise bpe vocab",
    "data": "prepare preview dataset preprocess encode datasets",
    "doctor": "check env version diagnose system hardware gpu info-system",
    "plan": "estimate memory vram cost dry-run fits",
    "ask": "question answer query",
}


def meanings() -> dict[str, list[str]]:
    """For each word of another program, the flags that mean what it means."""
    found: dict[str, list[str]] = {}
    for flags, words in _FLAGS.items():
        for word in words.split():
            found.setdefault(word, []).extend(flags)
    return found


def flag_for(written: str, known: Collection[str]) -> str:
    """Of a command's flags the one that means what was written, "" where none is known to."""
    word = written.partition("=")[0].lstrip("-").replace("_", "-").lower()
    flags = meanings()
    candidates = flags.get(word) or flags.get(word.removeprefix("no-"), [])
    return next((flag for flag in candidates if flag in known), "")


def nearest_flag(written: str, known: Iterable[str]) -> str:
    """The flag that means what was written, else those that are spelled most like it."""
    known = [flag for flag in known if flag.startswith("--")]
    return flag_for(written, known) or nearest(written.partition("=")[0], known)


def nearest_command(written: str, known: Collection[str]) -> str:
    """The command that means what was written, else those that are spelled most like it."""
    word = written.replace("_", "-").lower()
    meant = (command for command, words in _COMMANDS.items() if word in words.split())
    return next((command for command in meant if command in known), "") or nearest(word, known)


def refusal(
    error: CycloptsError, command: Sequence[str], commands: Collection[str]
) -> SurgeryError:
    """A command line that cyclopts refuses as our error, with what was meant.

    Args:
        error: what cyclopts found wrong.
        command: the words that name the command.
        commands: all that could stand behind `surgery`, or behind the word of a group.
    """
    name = " ".join(("surgery", *command))
    if isinstance(error, UnknownCommandError):
        written = (error.unused_tokens or [""])[0]
        found = nearest_command(written, commands)
        return SurgeryError(f"there is no {name} {written}", f"{found}? {name} --help lists all")
    hint = f"{name} --help lists the flags"
    if isinstance(error, UnknownOptionError):
        written = error.token.keyword or error.token.value
        flags = [flag for argument in error.argument_collection or () for flag in argument.names]
        if Path(error.token.source).is_file():
            return _unknown_key(Path(error.token.source), written.strip("[]"), flags)
        found = nearest_flag(written, flags)
        near = f"{found}? " if found.count(",") < 3 else ""  # else it is all there are
        return SurgeryError(f"{name} has no flag {written}", near + hint)
    argument = error.argument
    if isinstance(error, MissingArgumentError) and argument is not None and not argument.tokens:
        word = argument.name.lstrip("-").upper().replace("-", "_")
        missing = f"{argument.name} {'PATH' if argument.hint is Path else '…'}"
        if argument.field_info.is_positional:
            missing = f"{'an' if word[0] in 'AEIO' else 'a'} {word}"
        return SurgeryError(f"{' '.join(command)} needs {missing}", hint)
    return SurgeryError(str(error), hint)


def _unknown_key(file: Path, key: str, flags: Iterable[str]) -> SurgeryError:
    """An unknown key of a config file, with its line and the nearest key."""
    lines = file.read_text(encoding="utf-8").splitlines()
    number = next((i for i, line in enumerate(lines, 1) if line.strip().startswith(key)), 0)
    found = nearest_flag(f"--{key.replace('_', '-')}", flags)
    known = ", ".join(flag[2:].replace("-", "_") for flag in found.split(", "))
    return SurgeryError(f"{file}, line {number}: unknown key {key}", f"{known}?")
