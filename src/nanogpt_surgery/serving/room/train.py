"""One training at a time, in a process of its own: `surgery finetune` into an ordinary run folder.

It goes on without the server's help and without harming it. The server reads what the run writes;
its newest checkpoint takes part in answers under the run's name. When the server stops, so does the
training, with a checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from nanogpt_surgery.data.conversations.instruction_dataset import preview
from nanogpt_surgery.data.conversations.instructions import read_examples
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.writing import replace_text
from nanogpt_surgery.formats.folders.run_folder import checkpoints
from nanogpt_surgery.formats.peft.layout import adapter_to_ours
from nanogpt_surgery.formats.peft.reading import adapter_folder, load_adapter, read_adapter
from nanogpt_surgery.generation.settings import SamplingSettings
from nanogpt_surgery.lora.several import adapter_names, lora_layers
from nanogpt_surgery.lora.stored_adapter import restore
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.runs.data import window_length
from nanogpt_surgery.serving.fields import NAME, TEXT, Field, read_fields, required
from nanogpt_surgery.serving.http import ApiError, contained, read_json
from nanogpt_surgery.serving.request import Request as TextRequest
from nanogpt_surgery.serving.room import runs
from nanogpt_surgery.serving.room.operate import ALPHA, RANK, TARGETS
from nanogpt_surgery.values import Kind, integer, number

if TYPE_CHECKING:
    from nanogpt_surgery.serving.server import Server

LARGEST_DATA = 64 << 20  # bytes of a text that is dropped on the page
LOOK_EVERY = 0.2  # seconds
GRACE = 120.0  # seconds that a training has to save its checkpoint
PLANNED_WITHIN = 300.0  # seconds
_SHOWN_EXAMPLES, _SHOWN_TEXT, _SAMPLED = 3, 2_000, 48
_LINES_OF_ERROR = 6
ENDED = ("ended", "failed", "stopped")

_SUFFIXES = {"text": ".txt", "jsonl": ".jsonl"}
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
    "sample_prompt": Field(TEXT),
}
_FLAGS = (
    *("rank", "alpha", "max_steps", "learning_rate"),
    *("batch_size", "block_size", "evaluate_every"),
)


@dataclass
class Process:
    """A training's process, and what the server has read of its run."""

    run: Path
    process: subprocess.Popen[str]
    prompt: str | None = None
    """to be continued at each checkpoint, in the place of the run's own sample"""
    asked: str | None = None
    """what its end means: "paused" or "stopped"; None: that it is done"""
    state: str = "running"
    error: str | None = None
    newest: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    sampled: set[int] = field(default_factory=set)


class Trainer:
    """Begins and ends trainings, and says how they go.

    Args:
        server: whose model they begin from.
    """

    def __init__(self, server: Server):
        self.server, self.revision = server, 0
        self.current: Process | None = None
        self._rows: list[dict[str, Any]] = []  # for all pages, in order
        self._lock = threading.Lock()

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
        if (current := self.current) is None:
            return None
        how = {"run": current.run.name, "state": current.state, "error": current.error}
        most = runs.most_steps(current.run)
        return {"step": 0, "max_steps": most, **current.newest, **how}

    def cursor(self) -> int:
        """Returns from where a page that comes now is told: from the newest on."""
        return max(0, len(self._rows) - 1)

    def since(self, cursor: int) -> tuple[list[dict[str, Any]], int]:
        """Returns what there is to tell from a cursor on, and the next cursor."""
        rows = self._rows[cursor:]
        return rows, cursor + len(rows)

    def command(self, values: Mapping[str, Any], data: Path, out: Path) -> list[str]:
        """Returns the arguments of `surgery` for a training."""
        words = ["finetune", self.server.source, str(data), "--out", str(out)]
        for name in _FLAGS:
            if values[name] is not None:
                words += [f"--{name.replace('_', '-')}", str(values[name])]
        return [*words, "--targets", *values["targets"]]

    def data(self, values: Mapping[str, Any], goal: Path) -> Path:
        """Returns the file to train on: what was dropped, written to `goal`, or one named.

        Raises:
            ApiError: there is neither, or the file is not below the folder of runs.
        """
        kind = required(values, "kind")
        if values["path"] is not None:
            path = contained(self.folder, values["path"])
            if not path.is_file():
                raise ApiError(404, f"there is no file {values['path']!r} there", param="path")
            return path
        content = required(values, "content")
        place = goal.with_name(goal.name + _SUFFIXES[kind])
        replace_text(place, content)
        return place

    def start(self, values: Mapping[str, Any]) -> str:
        """Begins a training, and returns the name of its run.

        Raises:
            ApiError: one runs, or there is a run of that name.
        """
        name = required(values, "name")
        goal = contained(self.folder, name)
        with self._lock:
            self._check_free()
            if goal.exists():
                raise ApiError(409, f"there is a run {name!r} already", param="name")
            data = self.data(values, goal)
            self._begin(self.command(values, data, goal), goal, values["sample_prompt"])
        return name

    def resume(self, name: str) -> None:
        """Goes on with a run from its newest checkpoint.

        Raises:
            ApiError: a training runs, or how the run was begun is not known.
        """
        goal = contained(self.folder, name)
        with self._lock:
            self._check_free()
            typed = runs.typed_for(goal) or {}
            words, folder = typed.get("arguments"), typed.get("folder")
            if not (isinstance(words, list) and words[:1] == ["finetune"] and "--out" in words):
                raise ApiError(400, f"how {name!r} was begun is not known", param="name")
            out = Path(str(folder), str(words[words.index("--out") + 1])).resolve()
            if out != goal:
                raise ApiError(400, f"{name!r} was begun in another folder", param="name")
            words = [str(word) for word in words if word != "--resume"]
            self._begin(["finetune", "--resume", *words[1:]], goal, None, str(folder))

    def end(self, how: str, name: str | None) -> None:
        """Asks the training for a checkpoint and its end, to be "paused" or "stopped" then.

        Raises:
            ApiError: none of that name runs.
        """
        current = self.current
        if current is None or (name is not None and name != current.run.name):
            raise ApiError(404, "no such training runs", param="name")
        if current.state == "paused" and how == "stopped":
            current.state = how
            self._tell(current)
        elif current.process.poll() is None:
            current.asked = how
            current.process.send_signal(signal.SIGTERM)

    def _check_free(self) -> None:
        self.server.check_running()
        if self.current is not None and self.current.process.poll() is None:
            raise ApiError(409, f"the training {self.current.run.name!r} runs", code="busy")

    def _begin(
        self, words: list[str], goal: Path, prompt: str | None, folder: str | None = None
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
            start_new_session=True,  # a Ctrl-C in the server's terminal reaches it once, by us
        )
        self.current = Process(goal, process, prompt)
        said: list[str] = []
        reader = threading.Thread(target=_read_lines, args=(process, said), daemon=True)
        reader.start()
        # No daemon: a server that stops waits until the training has its checkpoint.
        threading.Thread(target=self._watch, args=(self.current, reader, said)).start()
        self.revision += 1

    def _watch(self, current: Process, reader: threading.Thread, said: list[str]) -> None:
        """Reads what a run writes until its process has ended."""
        seen = len(runs.metrics_of(current.run))
        while current.process.poll() is None:
            seen = self._look(current, seen)
            if self.server.stopping.wait(LOOK_EVERY):
                self._end_with_server(current)
        reader.join()
        self._look(current, seen)
        status = current.process.returncode
        if current.asked is not None:
            current.state = current.asked
        elif status == 0:
            current.state = "ended"
        else:
            current.state = "failed"
            current.error = "\n".join(said[-_LINES_OF_ERROR:]) or f"it ended with status {status}"
        self.revision += 1
        self._tell(current)

    def _end_with_server(self, current: Process) -> None:
        current.asked = current.asked or "paused"
        current.process.send_signal(signal.SIGTERM)
        try:
            current.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            current.process.kill()

    def _look(self, current: Process, seen: int) -> int:
        """Tells of the steps after the first `seen`; returns how many there are."""
        rows = runs.metrics_of(current.run)
        most = runs.most_steps(current.run)
        for count in range(seen + 1, len(rows) + 1):
            current.newest = runs.figures_of(rows[max(0, count - runs.RATE_OF) : count], most)
            self._tell(current)
        self._take_checkpoint(current)
        return len(rows)

    def _take_checkpoint(self, current: Process) -> None:
        """Lets the newest checkpoint answer, where there is one that was not taken yet."""
        found = checkpoints(current.run)
        if not found or found[-1].name == current.checkpoint or self.server.stopping.is_set():
            return
        newest, name = found[-1], current.run.name
        try:
            take = self.server.noting(lambda model: take_adapter(model, newest, name))
            self.server.engine.operate(take).result()
            self.server.folders[name] = current.run
        except SurgeryError as error:
            current.error = f"{newest.name} does not answer here: {error.what}"
        current.checkpoint = newest.name
        samples = self._sampled(current) if current.prompt else None
        if samples is None:
            samples = runs.samples_of(current.run, current.sampled)
        current.sampled.update(sample["step"] for sample in samples)
        self._tell(current, samples=samples)

    def _sampled(self, current: Process) -> list[dict[str, Any]]:
        """Returns what the newest checkpoint and the base make of the prompt of the page."""
        server, prompt = self.server, current.prompt or ""
        texts = []
        for adapters in ({current.run.name: 1.0}, {}):
            try:
                ids = tuple(server.tokenizer.encode(prompt))
                count = min(_SAMPLED, server.model.config.block_size - len(ids) + 1)
                greedy = SamplingSettings(temperature=0)
                answer = server.engine.submit(TextRequest(ids, count, greedy, adapters=adapters))
                texts.append(server.tokenizer.decode([token.id for token in answer.result()]))
            except SurgeryError as error:
                texts.append(f"[{error.what}]")
        step = current.newest.get("step", 0)
        return [{"step": step, "prompt": prompt, "text": texts[0], "base_text": texts[1]}]

    def _tell(self, current: Process, **more: Any) -> None:
        how = {"run": current.run.name, "state": current.state, "error": current.error}
        most = runs.most_steps(current.run)
        self._rows.append({"step": 0, "max_steps": most, **current.newest, **how, **more})


def _read_lines(process: subprocess.Popen[str], said: list[str]) -> None:
    """Keeps the last lines that a process says, so that it never waits for a reader."""
    assert process.stderr is not None
    with process.stderr:
        for line in process.stderr:
            said.append(line.rstrip())
            del said[: -4 * _LINES_OF_ERROR]


def take_adapter(model: SimpleGPT, folder: Path, name: str) -> None:
    """Puts an adapter on a model, or, where it is there, what it has learned since.

    The second is no operation: as in any training, what an adapter has learned is not undone.

    Raises:
        SurgeryError: as `load_adapter`.
    """
    if name not in adapter_names(model):
        load_adapter(model, folder, name=name)
        return
    stored = adapter_to_ours(read_adapter(adapter_folder(folder)), model).in_float32()
    layers = lora_layers(model)
    with torch.no_grad():
        for path, update in stored.updates.items():
            made = restore(update, layers[path].original_layer)
            for old, new in zip(
                layers[path].updates[name].parameters(), made.parameters(), strict=True
            ):
                old.copy_(new)


def preview_of(trainer: Trainer, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of some data is trained on, the first examples in pieces.

    Raises:
        ApiError, SurgeryError: there is no data, or it cannot be read.
    """
    tokenizer = trainer.server.tokenizer
    goal = trainer.folder / ".preview"
    path = trainer.data(values, goal)
    try:
        if values["kind"] == "text":
            text = path.read_text(encoding="utf-8")
            pieces = [{"text": text[:_SHOWN_TEXT], "answer": True}]
            note = "the beginning is shown" if len(text) > _SHOWN_TEXT else ""
            tokens = len(tokenizer.encode(text))
            return {"examples": [{"pieces": pieces}], "count": 1, "tokens": tokens, "note": note}
        found = read_examples([path], tokenizer)
    except UnicodeDecodeError as error:
        raise SurgeryError(f"the file is not text in UTF-8: byte {error.start:,}") from None
    finally:
        if path.parent == goal.parent and path.name.startswith(goal.name):
            path.unlink()
    length = window_length(None, trainer.server.model.config.block_size)
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
        ApiError, SurgeryError: as the training, or it took too long.
    """
    goal = trainer.folder / ".plan"
    data = await asyncio.to_thread(trainer.data, values, goal)
    words = [*trainer.command(values, data, goal), "--plan", "--json"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nanogpt_surgery", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, said = await asyncio.wait_for(process.communicate(), PLANNED_WITHIN)
    except TimeoutError:
        process.kill()
        raise ApiError(504, f"the plan took more than {PLANNED_WITHIN:.0f} s") from None
    finally:
        if values["path"] is None:
            data.unlink(missing_ok=True)
    if process.returncode:
        lines = said.decode("utf-8", "replace").splitlines()
        raise ApiError(400, "\n".join(lines[-_LINES_OF_ERROR:]))
    found = json.loads(out)
    title, rows = found.pop("title"), found.pop("rows")
    return {"title": title, "rows": rows, "summary": found}


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
