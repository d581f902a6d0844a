"""One training at a time, in a process of its own: `surgery finetune` into an ordinary run folder.

It goes on without the server's help and without harming it. The server reads what the run writes;
its newest checkpoint takes part in answers under the run's name. When the server stops, so does the
training, with a checkpoint.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from torch import nn

from nanogpt_surgery.data.conversations.instruction_dataset import preview
from nanogpt_surgery.data.conversations.instructions import read_examples
from nanogpt_surgery.data.text.corpus import read_texts
from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.writing import replace_text
from nanogpt_surgery.formats.folders.run_folder import checkpoints, step_of
from nanogpt_surgery.formats.peft.layout import adapter_to_ours
from nanogpt_surgery.formats.peft.reading import adapter_folder, load_adapter, read_adapter
from nanogpt_surgery.generation.settings import SamplingSettings
from nanogpt_surgery.history.model_history import operation
from nanogpt_surgery.lora.operations import blend_lora
from nanogpt_surgery.lora.several import (
    adapter_names,
    adapter_weights,
    check_new_name,
    has_lora,
    lora_layers,
)
from nanogpt_surgery.lora.stored_adapter import restore
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.runs.data import window_length
from nanogpt_surgery.serving.fields import NAME, TEXT, Field, read_fields, required
from nanogpt_surgery.serving.http import ApiError, contained, read_json
from nanogpt_surgery.serving.request import Request as TextRequest
from nanogpt_surgery.serving.room import runs
from nanogpt_surgery.serving.room.operate import ALPHA, RANK, TARGETS
from nanogpt_surgery.serving.security import KEY_VARIABLE
from nanogpt_surgery.values import Kind, integer, number

if TYPE_CHECKING:
    from nanogpt_surgery.serving.server import Server

LARGEST_DATA = 64 << 20  # bytes of a text that is dropped on the page
LOOK_EVERY = 0.2  # seconds
GRACE = 120.0  # seconds that a training has to save its checkpoint
PLANNED_WITHIN = 300.0  # seconds
_SHOWN_EXAMPLES, _SHOWN_TEXT, _SAMPLED = 3, 2_000, 48
_LINES_OF_ERROR = 6
MOST_TOLD = 4_096  # events that a page which has lost its connection may have missed
_NOT_RESUMED = ("--config", "--out=", "--cache-dir")  # what a run's own file may not ask for

_SUFFIXES = {"text": ".txt", "jsonl": ".jsonl"}
_READ_AS = {"text": "text", "jsonl": "instructions"}
_DATA = {
    "kind": Field(Kind("text or jsonl", lambda x: x in [*_SUFFIXES])),
    "content": Field(TEXT),
    "path": Field(TEXT),
}
_TRAINING = _DATA | {
    "name": Field(NAME),
    "targets": Field(TARGETS, ["q_proj", "v_proj"]),
    "rank": Field(RANK, 8),
    "alpha": Field(ALPHA),
    "max_steps": Field(integer(1, 10_000_000)),
    "learning_rate": Field(number("above 0 and at most 1", lambda x: 0 < x <= 1)),
    "batch_size": Field(integer(1, 4_096)),
    "block_size": Field(integer(1, 1 << 20)),
    "evaluate_every": Field(integer(1, 10_000_000)),
    "sample_every": Field(integer(0, 10_000_000)),
    "sample_prompt": Field(TEXT),
}
_FLAGS = (
    *("rank", "alpha", "max_steps", "learning_rate"),
    *("batch_size", "block_size", "evaluate_every", "sample_every"),
)


@dataclass
class Process:
    """A training's process, and what the server has read of its run."""

    run: Path
    process: subprocess.Popen[str]
    steps: runs.NewSteps
    prompt: str | None = None
    """to be continued at each checkpoint, in the place of the run's own sample"""
    written: Path | None = None
    """the data that was dropped; it goes where no run has come of it"""
    asked: str | None = None
    """what its end means: "paused" or "stopped"; None: that it is done"""
    state: str = "running"
    error: str | None = None
    """why it failed"""
    not_taken: str | None = None
    """why its newest checkpoint does not answer"""
    most: int | None = None
    """steps in all, when the run says it"""
    newest: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    """the newest that answers"""
    sampled: set[int] = field(default_factory=set)
    taken: list[nn.Module] = field(default_factory=list)
    """the adapter on the model that it wrote to last; another of its name is not its own"""


class Trainer:
    """Begins and ends trainings, and says how they go.

    Args:
        server: whose model they begin from.
    """

    def __init__(self, server: Server):
        self.server, self.revision = server, 0
        self.current: Process | None = None
        self.plans = threading.Lock()  # one at a time
        self._rows: list[dict[str, Any]] = []  # for all pages, in order: the newest
        self._told = 0
        self._lock, self._telling = threading.Lock(), threading.Lock()

    @property
    def folder(self) -> Path:
        """Where runs are.

        Raises:
            ApiError: the server was started without.
        """
        if self.server.runs_folder is None:
            raise ApiError(403, "training is off: the server was started without a folder of runs")
        return self.server.runs_folder

    def now(self) -> dict[str, Any] | None:
        """Returns how the training is, None where there was none."""
        return None if (current := self.current) is None else self._row(current)

    def cursor(self) -> int:
        """Returns from where a page that comes now is told: from the newest on."""
        return max(0, self._told - 1)

    def since(self, cursor: int) -> tuple[list[dict[str, Any]], int]:
        """Returns what there is to tell from a cursor on, and the next cursor."""
        with self._telling:
            count = min(self._told - cursor, len(self._rows))
            return self._rows[len(self._rows) - count :], self._told

    def command(self, values: Mapping[str, Any], data: Path, out: Path) -> list[str]:
        """Returns the arguments of `surgery` for a training."""
        words = ["finetune", self.server.source, str(data), "--out", str(out)]
        words += ["--data", _READ_AS[values["kind"]]]
        for name in _FLAGS:
            if values[name] is not None:
                words += [f"--{name.replace('_', '-')}", str(values[name])]
        return [*words, "--targets", *values["targets"]]

    def named(self, path: str) -> Path:
        """Returns a file below the folders of runs and of adapters.

        Raises:
            ApiError: there is none, or it is too large.
        """
        homes = [self.folder, self.server.adapters_folder]
        places = [contained(home, path) for home in homes if home is not None]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise ApiError(404, f"there is no file {path!r} there", param="path")
        return found

    def start(self, values: Mapping[str, Any]) -> str:
        """Begins a training, and returns the name of its run.

        Raises:
            ApiError: one runs, or there is a run, an adapter or a model of that name.
            SurgeryError: an adapter cannot have the name.
        """
        name = required(values, "name")
        check_new_name(nn.Module(), name)
        goal, kind = contained(self.folder, name), required(values, "kind")
        if values["sample_prompt"]:
            prompt_ids(self.server.tokenizer, values["sample_prompt"])
        with self._lock:
            self._check_free()
            if goal.exists() or name in (self.server.name, *self.server.adapters):
                what = f"there is a run, an adapter or a model {name!r} already"
                raise ApiError(409, what, param="name")
            written = None
            if values["path"] is None:
                written = _free(goal, _SUFFIXES[kind])
                replace_text(written, required(values, "content"))
            data = written or self.named(values["path"])
            words = self.command(values, data, goal)
            self._begin(words, goal, prompt=values["sample_prompt"], written=written)
        return name

    def resume(self, name: str) -> None:
        """Goes on with a run from its newest checkpoint.

        Raises:
            ApiError: a training runs, or the run is not one of a LoRA on the model that is served.
        """
        goal = contained(self.folder, name)
        with self._lock:
            self._check_free()
            if name in self.server.adapters and self.server.folders.get(name) != goal:
                raise ApiError(409, f"there is another adapter {name!r}", param="name")
            words, folder = self._typed(goal)
            self._begin(["finetune", "--resume", *words[1:]], goal, folder)

    def _typed(self, run: Path) -> tuple[list[str], str]:
        """Returns the command that began a run, and where it was typed.

        It was read from a file: what it names has to be what the server would name itself.
        """
        typed = runs.typed_for(run) or {}
        words, folder = typed.get("arguments"), typed.get("folder")
        if not (isinstance(words, list) and isinstance(folder, str) and _can_go_on(words)):
            what = f"how {run.name!r} was begun is not known, or cannot be gone on with here"
            raise ApiError(400, what, param="name")
        out, base, source = words[words.index("--out") + 1], words[1], self.server.source
        same = base == source or Path(folder, base).resolve() == Path(source).resolve()
        if Path(folder, out).resolve() != run or not same:
            what = f"{run.name!r} was begun in another folder, or on another model"
            raise ApiError(400, what, param="name")
        return [word for word in words if word != "--resume"], folder

    def end(self, how: str, name: str | None) -> None:
        """Asks the training for a checkpoint and its end, to be "paused" or "stopped" then.

        Raises:
            ApiError: none of that name runs.
        """
        current = self.current
        if current is None or (name is not None and name != current.run.name):
            raise ApiError(404, "no such training runs", param="name")
        with self._lock:  # its end is not seen meanwhile
            if current.state == "paused" and how == "stopped":
                current.state = how
            elif current.process.poll() is None:
                current.asked, current.state = how, "stopping"
                current.process.send_signal(signal.SIGTERM)
        self._tell(current)

    def _check_free(self) -> None:
        self.server.check_running()
        if self.current is not None and self.current.process.poll() is None:
            raise ApiError(409, f"the training {self.current.run.name!r} runs", code="busy")

    def _begin(
        self,
        words: list[str],
        goal: Path,
        folder: str | None = None,
        prompt: str | None = None,
        written: Path | None = None,
    ) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "nanogpt_surgery", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            cwd=folder,
            env=_environment(),
            start_new_session=True,  # a Ctrl-C in the server's terminal reaches it once, by us
        )
        current = Process(goal, process, runs.NewSteps(goal), prompt, written)
        self.current = current
        # No daemon: a server that stops waits until the training has its checkpoint.
        threading.Thread(target=self._watch, args=(current,)).start()
        threading.Thread(target=self._take_checkpoints, args=(current,), daemon=True).start()
        self._tell(current)

    def _watch(self, current: Process) -> None:
        """Reads what a run writes until its process has ended."""
        said: list[str] = []
        reader = threading.Thread(target=_read_lines, args=(current.process, said), daemon=True)
        reader.start()
        newest = deque[dict[str, Any]](maxlen=runs.RATE_OF)
        while current.process.poll() is None:
            self._tell_steps(current, newest)
            if self.server.stopping.wait(LOOK_EVERY):
                self._end_with_server(current)
        reader.join()
        self._tell_steps(current, newest)
        with self._lock:
            self._end(current, said)
        if current.written is not None and not current.run.exists():
            current.written.unlink(missing_ok=True)
        self._tell(current)

    def _end(self, current: Process, said: list[str]) -> None:
        """Takes the state of a training whose process has ended; its error is what that said."""
        status = current.process.returncode
        if status == 0:  # so it does not where it was asked to end before
            current.state = "ended"
        elif current.asked is not None:
            current.state = current.asked if checkpoints(current.run) else "stopped"
        else:
            current.state = "failed"
            current.error = "\n".join(said[-_LINES_OF_ERROR:]) or f"it ended with status {status}"

    def _end_with_server(self, current: Process) -> None:
        current.asked = current.asked or "paused"
        current.process.send_signal(signal.SIGTERM)
        try:
            current.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            current.process.kill()
            current.process.wait()

    def _tell_steps(self, current: Process, newest: deque[dict[str, Any]]) -> None:
        current.most = current.most or runs.most_steps(current.run)
        for row in current.steps.read():
            newest.append(row)
            current.newest = runs.figures_of(list(newest), current.most)
            self._tell(current, anew=False)

    def _take_checkpoints(self, current: Process) -> None:
        """Lets each checkpoint answer as it comes, the last one after the end too."""
        while not self.server.stopping.wait(LOOK_EVERY):
            is_last = current.process.poll() is not None
            newest = checkpoints(current.run)[-1:]
            if newest and newest[0].name != current.checkpoint:
                self.take_checkpoint(current, newest[0])
            if is_last:
                break

    def take_checkpoint(self, current: Process, newest: Path) -> None:
        """Lets a checkpoint answer, under the run's name, and tells what became of it."""
        server, name = self.server, current.run.name

        def take(model: SimpleGPT) -> None:
            there = updates_of(model, name)
            known = there == current.taken
            if there and not (known if current.taken else server.folders.get(name) == current.run):
                raise SurgeryError(f"the model carries another adapter named {name}")
            take_adapter(model, newest, name)
            server.folders[name], current.taken = current.run, updates_of(model, name)

        try:
            server.engine.operate(take, server.take_changes).result()
            current.not_taken = None
        except Exception as error:  # whatever it is: the training goes on without answering
            current.not_taken = f"{newest.name} does not answer here: {error}"
        current.checkpoint = newest.name
        samples = self._sampled(current, newest) if current.prompt else None
        if samples is None:
            samples = runs.samples_of(current.run, current.sampled)
        current.sampled.update(sample["step"] for sample in samples)
        self._tell(current, samples=samples)

    def _sampled(self, current: Process, newest: Path) -> list[dict[str, Any]]:
        """Returns what the newest checkpoint and the base make of the prompt of the page."""
        server, prompt = self.server, current.prompt or ""
        texts = []
        for adapters in ({current.run.name: 1.0}, {}):
            try:
                ids = tuple(prompt_ids(server.tokenizer, prompt))
                count = min(_SAMPLED, server.model.config.block_size - len(ids) + 1)
                greedy = SamplingSettings(temperature=0)
                answer = server.engine.submit(TextRequest(ids, count, greedy, adapters=adapters))
                texts.append(server.tokenizer.decode([token.id for token in answer.result()]))
            except SurgeryError as error:
                texts.append(f"[{error.what}]")
        step = step_of(newest)
        return [{"step": step, "prompt": prompt, "text": texts[0], "base_text": texts[1]}]

    def _row(self, current: Process) -> dict[str, Any]:
        how = {
            "run": current.run.name,
            "state": current.state,
            "error": current.error or current.not_taken,
            "checkpoint": current.checkpoint or None,
        }
        return {"step": 0, "max_steps": current.most, **current.newest, **how}

    def _tell(self, current: Process, anew: bool = True, **more: Any) -> None:
        """Tells all pages of the training; `anew`: the state that they show is another one.

        Of a run that has been resumed, the process before may have samples left to tell.
        """
        with self._telling:
            newest = self.current
            if newest is not None and newest.run == current.run:
                current = newest
            self._rows.append(self._row(current) | more)
            del self._rows[:-MOST_TOLD]
            self._told += 1
            self.revision += anew


def _can_go_on(words: list[Any]) -> bool:
    """Whether arguments are those of a fine-tuning that says where its run is, and no more."""
    return (
        all(isinstance(word, str) for word in words)
        and len(words) > 3
        and words[0] == "finetune"
        and words.count("--out") == 1
        and words[-1] != "--out"
        and not any(word.startswith(_NOT_RESUMED) for word in words)
    )


def _environment() -> dict[str, str]:
    """Returns the environment of a training, which needs no key."""
    return {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}


def _free(goal: Path, suffix: str) -> Path:
    """Returns the first name beside a run at which nothing is."""
    names = (f"{goal.name}{'' if n == 1 else f'-{n}'}{suffix}" for n in itertools.count(1))
    return next(place for name in names if not (place := goal.with_name(name)).exists())


def _read_lines(process: subprocess.Popen[str], said: list[str]) -> None:
    """Keeps the last lines that a process says, so that it never waits for a reader."""
    assert process.stderr is not None
    with process.stderr:
        for line in process.stderr:
            said.append(line.rstrip())
            del said[: -4 * _LINES_OF_ERROR]


def updates_of(model: SimpleGPT, name: str) -> list[nn.Module]:
    """Returns the updates of an adapter, layer after layer; none where there is no such adapter."""
    layers = lora_layers(model).values() if has_lora(model) else ()
    return [layer.updates[name] for layer in layers if name in layer.updates]


def take_adapter(model: SimpleGPT, folder: Path, name: str) -> None:
    """Puts an adapter on a model, or, where it is there, what it has learned since.

    Those that take part stay. The second is no operation: as in any training, what an adapter has
    learned is not undone.

    Raises:
        SurgeryError: as `load_adapter`, or the one that is there is of another form.
    """
    weights = {n: w for n, w in adapter_weights(model).items() if w is not None}
    if name not in adapter_names(model):
        with operation(model, f"load {name}"):
            load_adapter(model, folder, name=name)
            if weights:
                blend_lora(model, weights)
        return
    stored = adapter_to_ours(read_adapter(adapter_folder(folder)), model).in_float32()
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.updates}
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for path in layers.keys() | stored.updates.keys():
        if path not in layers or path not in stored.updates:
            raise SurgeryError(f"the adapter {name} on the model has other layers: {path}")
        made = restore(stored.updates[path], layers[path].original_layer)
        olds = [*layers[path].updates[name].parameters()]
        news = [*made.parameters()]
        if [old.shape for old in olds] != [new.shape for new in news]:
            raise SurgeryError(f"the adapter {name} on the model has another rank in {path}")
        pairs += zip(olds, news, strict=True)
    with torch.no_grad():
        for old, new in pairs:
            old.copy_(new)


@contextmanager
def _data_of(trainer: Trainer, values: Mapping[str, Any]) -> Iterator[Path]:
    """Within the block, the data of a training that is not begun: a file that goes with it."""
    kind = required(values, "kind")
    if values["path"] is not None:
        yield trainer.named(values["path"])
        return
    content = required(values, "content")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, f"dropped{_SUFFIXES[kind]}")
        path.write_text(content, encoding="utf-8")
        yield path


def preview_of(trainer: Trainer, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of some data is trained on, the first examples in pieces.

    Raises:
        ApiError: there is no data, or it is too much to read it here.
        SurgeryError: it cannot be read.
    """
    tokenizer = trainer.server.tokenizer
    length = window_length(values["block_size"], trainer.server.model.config.block_size)
    with _data_of(trainer, values) as path:
        if (size := path.stat().st_size) > LARGEST_DATA:
            what = f"the file has {size:,} bytes; {LARGEST_DATA:,} can be previewed"
            raise ApiError(413, what, param="path")
        if values["kind"] == "text":
            text = read_texts([str(path)])
            pieces = [{"text": text[:_SHOWN_TEXT], "answer": True}]
            note = "the beginning is shown" if len(text) > _SHOWN_TEXT else ""
            tokens = len(tokenizer.encode(text))
            return {"examples": [{"pieces": pieces}], "count": 1, "tokens": tokens, "note": note}
        found = read_examples([path], tokenizer)
    shown = [preview(one.cut(length + 1), tokenizer) for one in found[:_SHOWN_EXAMPLES]]
    return {
        "examples": [
            {"pieces": [{"text": text, "answer": trained} for text, trained in pieces]}
            for pieces in shown
        ],
        "count": len(found),
        "tokens": sum(len(one.ids) for one in found),
        "note": "",
    }


async def plan_of(trainer: Trainer, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the command itself says that a training will take, by its `--plan`.

    Raises:
        ApiError: another plan is being made, it took too long, or the command refuses.
    """
    if not trainer.plans.acquire(blocking=False):
        raise ApiError(409, "another plan is being made", code="busy")
    try:
        with _data_of(trainer, values) as data:
            words = trainer.command(values, data, trainer.folder / ".plan")
            found: dict[str, Any] = json.loads(await _planned([*words, "--plan", "--json"]))
    finally:
        trainer.plans.release()
    title, rows = found.pop("title"), found.pop("rows")
    return {"title": title, "rows": rows, "summary": found}


async def _planned(words: list[str]) -> bytes:
    """Returns what the command writes."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nanogpt_surgery", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(),
    )
    try:
        out, said = await asyncio.wait_for(process.communicate(), PLANNED_WITHIN)
    except TimeoutError:
        raise ApiError(504, f"the plan took more than {PLANNED_WITHIN:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        lines = said.decode("utf-8", "replace").splitlines()
        raise ApiError(400, "\n".join(lines[-_LINES_OF_ERROR:]))
    return out


def routes(trainer: Trainer, after_operations: Callable[[], bool]) -> list[BaseRoute]:
    """Returns the routes.

    Args:
        trainer: of the server.
        after_operations: called to learn whether the base is no longer what was opened.
    """

    async def previewed(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(preview_of, trainer, await _asked(request)))

    async def planned(request: Request) -> Response:
        return JSONResponse(await plan_of(trainer, await _asked(request)))

    async def started(request: Request) -> Response:
        values = await _asked(request)
        if after_operations():
            raise ApiError(
                409,
                "the base has been changed by operations, and a training begins from its file: "
                "undo them, or save the model and serve that",
            )
        return JSONResponse({"run": await asyncio.to_thread(trainer.start, values)})

    async def paused(request: Request) -> Response:
        trainer.end("paused", await _named(request))
        return JSONResponse({})

    async def stopped(request: Request) -> Response:
        trainer.end("stopped", await _named(request))
        return JSONResponse({})

    async def resumed(request: Request) -> Response:
        name = await _named(request)
        if name is None and trainer.current is not None:
            name = trainer.current.run.name
        await asyncio.to_thread(trainer.resume, name or "")
        return JSONResponse({"run": name})

    asked = {"preview": previewed, "plan": planned, "start": started}
    asked |= {"pause": paused, "resume": resumed, "stop": stopped}
    return [
        *(Route(f"/api/train/{name}", answer, methods=["POST"]) for name, answer in asked.items()),
        *_routes_of_runs(trainer),
    ]


async def _asked(request: Request) -> dict[str, Any]:
    return read_fields(await read_json(request, LARGEST_DATA), _TRAINING)


async def _named(request: Request) -> str | None:
    name: str | None = read_fields(await read_json(request), {"name": Field(NAME)})["name"]
    return name


def _routes_of_runs(trainer: Trainer) -> list[BaseRoute]:
    async def listed(_: Request) -> Response:
        found = await asyncio.to_thread(rows_of_runs, trainer)
        return JSONResponse({"runs": found})

    async def one(request: Request) -> Response:
        run = contained(trainer.folder, request.path_params["name"])
        if not run.is_dir():
            raise ApiError(404, f"there is no run {run.name!r}")
        return JSONResponse(await asyncio.to_thread(contents, trainer, run))

    return [Route("/api/runs", listed), Route("/api/runs/{name}", one)]


def rows_of_runs(trainer: Trainer) -> list[dict[str, Any]]:
    """Returns a row for each run below the folder."""
    return [_marked(trainer, runs.row_of(run)) for run in runs.runs_below(trainer.folder)]


def contents(trainer: Trainer, run: Path) -> dict[str, Any]:
    """Returns what there is to show of a run."""
    return _marked(trainer, runs.contents_of(run))


def _marked(trainer: Trainer, row: dict[str, Any]) -> dict[str, Any]:
    """Returns a run with its state as this server knows it, where it is its own."""
    now = trainer.now()
    here = now is not None and now["run"] == row["name"]
    return row | {"here": here} | ({"state": now["state"]} if here and now else {})
