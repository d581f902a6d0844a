"""An operation on a folder: in place, with undo, or into a new folder.

The model is opened, with adapters on it or without, the operation acts on it in memory with all its
checks, and what it has made, the model or an adapter, is written, read again and compared to the
bit before it counts. Whatever the folder holds beside the weights (config, tokenizer,
generation_config.json) keeps step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, required_tokenizer, vocab_size_of
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.atomic import write_folder
from nanogpt_surgery.files.disk_errors import free_bytes
from nanogpt_surgery.files.writing import read_json
from nanogpt_surgery.formats.comparison import check_equal
from nanogpt_surgery.formats.folders.run_folder import is_run
from nanogpt_surgery.formats.huggingface.config import CONFIG
from nanogpt_surgery.formats.huggingface.safetensors_file import weight_files
from nanogpt_surgery.formats.huggingface.tokenizer_files import VOCABULARY_FILES, chat_template_in
from nanogpt_surgery.formats.model_file import TENSORS as MODEL
from nanogpt_surgery.formats.model_file import (
    is_hub_name,
    model_folder,
    open_model,
    write_model_files,
)
from nanogpt_surgery.formats.peft.reading import TENSORS as ADAPTER
from nanogpt_surgery.formats.peft.reading import adapter_folder, load_adapter
from nanogpt_surgery.formats.peft.writing import write_adapter_files
from nanogpt_surgery.history.folder_history import (
    FolderOperation,
    operate,
    read_journal,
    record_made,
)
from nanogpt_surgery.history.model_history import combined, tensor_hash, tensor_hashes
from nanogpt_surgery.lora.merging import in_turn
from nanogpt_surgery.model.finite import check_finite_weights, is_finite
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.surgery.operating import hash_seconds

Act: TypeAlias = Callable[..., Report | tuple[Tokenizer, Report]]
"""Operates on a model with its tokenizer: act(model, tokenizer, probe=ids (B, T), plan=…); returns
a report, and the tokenizer that the model has then, if that is another."""
PROBE_ROWS, PROBE_TOKENS = 4, 64  # of a text, at most
RANDOM_TOKENS = 16  # in each row without one: computing on them is what takes longest in a merge
PASSES = 3  # over what is written: writing it, reading it again, hashing its files


@check_arguments
def operate_on_folder(
    model: str | Path,
    act: Act,
    out: str | Path | None = None,
    *,
    adapters: Mapping[str, str | Path] = MappingProxyType({}),
    made: str | None = None,
    keep_originals: bool = True,
    force: bool = False,
    probe: str | None = None,
    plan: bool = False,
) -> Report:
    """Does an operation to a model on disk, or one that makes an adapter of it.

    Args:
        model: a run or a model folder; with `out` whatever `open_model` opens.
        act: the operation.
        out: the folder to make; one of ours that lies there is replaced. The model's own (None),
            or that of one of the adapters, changes in one step, and `undo_folder` brings it back.
        adapters: the folder of each by its name on the model.
        made: the name of the adapter that the operation makes; by default the model is written.
        keep_originals: keep what was there, so that an operation in place can be undone.
        force: take adapters that were made for another base.
        probe: a text to measure on; random tokens if None.
        plan: write nothing, and say what would be, its sizes, memory and time.

    Raises:
        SurgeryError: a part does not open, `out` is the model or belongs to a run, the operation
            refuses, what was written does not read back, or the folder was changed meanwhile.
    """
    goal, in_place = goal_of(model, out, adapters, made)
    opened_at = read_journal(goal).lines if in_place else None
    start = time.perf_counter()
    network, tokenizer = open_model(model, "each")
    base = fingerprint(network, str(model))
    for name, path in adapters.items():
        load_adapter(network, path, name=name, force=force)
    opening = time.perf_counter() - start
    ids, measured_on = probe_ids(network, tokenizer, probe)
    acted = act(network, tokenizer, probe=ids, plan=plan)
    after, report = (tokenizer, acted) if isinstance(acted, Report) else acted
    if plan:
        return _planned(network, report, made, opening, (goal, in_place, keep_originals))
    done = _operation(report, base, made)
    write = partial(_write, network, after, model, made, adapters, done)
    gone = _stood_for(goal, after is not tokenizer) if in_place and not made else ()
    done = put_in_place(goal, in_place, write, f" of {model}", gone, keep_originals, opened_at)
    facts = {"measured_on": measured_on} | report.summary | {"folder": str(goal), "base": base}
    facts |= {"originals": done.originals, "sha256": done.changes()}
    return Report(report.title, report.rows, facts)


def _operation(report: Report, base: str, made: str | None) -> FolderOperation:
    """Returns an operation as a journal has it: `made` names nothing outside of the model."""
    plain = {k: v for k, v in report.summary.items() if isinstance(v, int | float | str)}
    return FolderOperation(report.title.removesuffix(f" as {made}"), base, measured=plain)


def _write(
    network: SimpleGPT,
    tokenizer: Tokenizer | None,
    model: str | Path,
    made: str | None,
    adapters: Mapping[str, str | Path],
    done: FolderOperation,
    new: Path,
) -> FolderOperation:
    """Writes the model, or the adapter that was made, and reads it again."""
    if made is None:
        write_model_files(network, new, tokenizer, model)
        again, tokenizer_again = open_model(new, "each")
        check_equal(network, again, tokenizer, tokenizer_again)
    else:
        templates = (chat_template_in(adapter_folder(path)) for path in adapters.values())
        template = next(filter(None, templates), None)
        write_adapter_files(network, new, str(model), name=made, chat_template=template)
    return done


def _stood_for(folder: Path, other_vocabulary: bool) -> set[str]:
    """Returns the names of the files that a model's new ones stand for."""
    return weight_files(folder) | ({*VOCABULARY_FILES} if other_vocabulary else set())


def goal_of(
    model: str | Path,
    out: str | Path | None,
    adapters: Mapping[str, str | Path] = MappingProxyType({}),
    made: str | None = None,
) -> tuple[Path, bool]:
    """Returns the folder that is written, and whether it changes in place; arguments as above.

    Raises:
        SurgeryError: it cannot be written.
    """
    if made is None:
        check_not_itself(model, out)
        return (_folder_in_place(model), True) if out is None else (Path(out), False)
    if out is None:
        raise SurgeryError("no folder for the adapter is named", "out=FOLDER")
    goal = Path(out)
    if is_run(goal) or is_run(goal.resolve().parent.parent):
        raise SurgeryError(
            f"{goal} belongs to a run, whose training goes on from its adapter as it is",
            "out=FOLDER writes a new adapter",
        )
    if goal.exists() and goal.resolve() == Path(model).resolve():
        raise SurgeryError(f"{goal} is the base itself", "name another folder")
    places = {adapter_folder(path).resolve() for path in adapters.values()}
    return goal, goal.resolve() in places


def _planned(
    network: SimpleGPT,
    report: Report,
    made: str | None,
    opening: float,
    place: tuple[Path, bool, bool],
) -> Report:
    """Adds to an operation's plan what the files will take; a model is read again beside itself."""
    summary, here = report.summary, sum(p.nbytes for p in network.parameters())
    model = summary.get("model_after_bytes", here) if made is None else 0
    written = model or summary["adapter_bytes"]
    seconds = summary["seconds"] + 2 * opening + PASSES * written / here * hash_seconds(network)
    sizes = planned_sizes(*place, weights=MODEL if made is None else ADAPTER)
    foreseen = {"memory_bytes": summary["memory_bytes"] + model, "seconds": seconds}
    return Report(report.title, report.rows, summary | sizes | foreseen)


def planned_sizes(goal: Path, in_place: bool, keep: bool, weights: str = MODEL) -> dict[str, Any]:
    """Returns where an operation would write, and the room that it has there."""
    there = weight_files(goal, weights) if in_place else ()
    old = sum((goal / name).stat().st_size for name in there)
    return {
        "written_to": f"{goal}{', in place' if in_place else ''}",
        "kept_originals_bytes": old if keep else 0,
        "free_bytes": free_bytes(goal),
    }


def put_in_place(
    goal: Path,
    in_place: bool,
    write: Callable[[Path], FolderOperation],
    made_of: str,
    gone: Collection[str] = (),
    keep_originals: bool = True,
    opened_at: list[dict[str, Any]] | None = None,
) -> FolderOperation:
    """Changes a folder in one step, or makes a new one; either has a journal that says so.

    Args:
        goal: the folder.
        in_place: it is there, and changes.
        write: writes the new files into an empty folder, and returns what was done.
        made_of: added to the operation's words where the folder is new.
        gone: the names of files that the new ones stand for.
        keep_originals: of a folder that changes.
        opened_at: the lines of its journal when it was opened: nothing may have changed it since.
    """

    def change(new: Path) -> FolderOperation:
        done = write(new)
        _leave_away_equal(new, goal, gone)
        return done

    def make(new: Path) -> FolderOperation:
        done = write(new)
        return record_made(new, replace(done, operation=done.operation + made_of))

    if not in_place:
        return write_folder(goal, make)
    return operate(goal, change, keep_originals, gone, opened_at)


def _leave_away_equal(new: Path, place: Path, gone: Collection[str]) -> None:
    """Drops the new files that stay in `place` as they are; a config, if it says the same."""
    for path in sorted(new.rglob("*"), reverse=True):
        name = path.relative_to(new)
        there = place / name
        if path.is_file() and there.is_file() and str(name) not in gone and _is_same(there, path):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _is_same(one: Path, other: Path) -> bool:
    if other.name == CONFIG and read_json(one) == read_json(other):
        return True
    return one.read_bytes() == other.read_bytes()


def check_not_itself(model: str | Path, out: str | Path | None) -> None:
    """Raises `SurgeryError` if `out` is the model itself, which could not be brought back then."""
    if out is None or not Path(model).is_dir():
        return
    if Path(out).resolve() in (Path(model).resolve(), model_folder(model).resolve()):
        raise SurgeryError(
            f"{out} is the model itself, and writing over it has no undo",
            "leave out the new folder to work in place, with undo",
        )


def _folder_in_place(model: str | Path) -> Path:
    """The folder that an operation without `out` changes.

    Raises:
        SurgeryError: it is a file, or a model on the hub, whose copies others read too.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if not folder.exists() and not is_hub_name(str(model)):
        raise SurgeryError(f"there is no folder {model}", "name a run or a model folder")
    kind = "no folder" if folder.exists() else "a model on the hub"
    raise SurgeryError(f"{model} is {kind}, so it cannot be changed in place",
                       "out=FOLDER writes a new one")  # fmt: skip


def fingerprint(model: SimpleGPT, where: str, hashes: dict[Tensor, str] | None = None) -> str:
    """The hash of all weights in float32, the same for a model in any dtype.

    Those of the tensors, in float32, are added to `hashes`.

    Raises:
        SurgeryError: one is NaN or infinite.
    """

    def look(tensor: Tensor) -> tuple[str, bool]:
        return tensor_hash(tensor.float()), is_finite(tensor)

    tensors = list(model.parameters())
    found, finite = zip(*in_turn(look, tensors), strict=True)
    if not all(finite):
        check_finite_weights(model, where)
    hashes = {} if hashes is None else hashes
    hashes.update(zip(tensors, found, strict=True))
    return combined(tensor_hashes(model, hashes).values())


def probe_ids(
    model: SimpleGPT, tokenizer: Tokenizer | None, text: str | None
) -> tuple[Tensor, str]:
    """Ids (B, T) to measure on, and what they are in words."""
    length = min(PROBE_TOKENS, model.config.block_size)
    if text is None:
        draw, shape = torch.Generator().manual_seed(0), (PROBE_ROWS, min(RANDOM_TOKENS, length))
        there = model.config.vocab_size
        there = there if tokenizer is None else min(there, vocab_size_of(tokenizer))
        ids = torch.randint(there, shape, generator=draw)
        return ids, f"{ids.numel()} random tokens"
    hint = "without a probe it is measured on random tokens"
    tokenizer = required_tokenizer(tokenizer, "the model", hint)
    encoded = list(tokenizer.encode(text[: 64 * PROBE_ROWS * PROBE_TOKENS]))
    rows = min(PROBE_ROWS, len(encoded) // length)
    if not rows:
        raise SurgeryError(f"the probe text has {len(encoded)} tokens, fewer than {length}",
                           "give a longer one, or none: then it is random tokens")  # fmt: skip
    ids = torch.tensor(encoded[: rows * length]).view(rows, length)
    return ids, f"{ids.numel()} tokens of the text given"
