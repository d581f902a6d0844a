"""`surgery adapter`: look at adapters, and make them of others, of models, or by cutting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.cli.framework.operation import MADE, Operand, OperationOptions
from nanogpt_surgery.cli.framework.options import AllLayers, Json, Model, weighted_folders
from nanogpt_surgery.errors import SurgeryError

Base: TypeAlias = Annotated[
    str | None, Parameter(help="its model; by default the one that the adapter names")
]
Adapter: TypeAlias = Annotated[
    Path, Parameter(help="an adapter folder, as finetune or peft writes it, or a run of finetune")
]
Several = Parameter(consume_multiple=True)


def examine(
    adapter: Adapter,
    *,
    base: Base = None,
    picture: Path | None = None,
    force: bool = False,
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Measure each update of an adapter against the weight that it changes.

    Its size beside W's, of how many directions it is (effective rank; far below the rank, a smaller
    rank would do), how much it turns what W does most (overlap, over chance), new directions among
    W's leading ones (intruders, arXiv:2410.21228), and what of it survives a merge in fewer bits.

    Args:
        picture: a PNG to draw sizes and ranks into
        force: take an adapter that was made for another base, with a warning
    """
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.formats.peft.reading import adapter_folder, load_adapter
    from nanogpt_surgery.interpret import examine as examined

    folder = adapter_folder(adapter)
    model, _ = open_model(_base_of(folder, base), "each")
    load_adapter(model, folder, name="examined", force=force)
    report = examined("examined", model)
    if picture is not None:
        from nanogpt_surgery.files.atomic import write_file
        from nanogpt_surgery.interpret.pictures import draw_examination

        write_file(picture, lambda goal: draw_examination(report, goal), magic=b"\x89PNG")
        say(f"wrote {picture}")
    show(report, json, all_layers)


def combine(
    adapters: Annotated[list[str], Parameter(help="FOLDER or FOLDER=WEIGHT, two or more")],
    *,
    base: Base = None,
    method: Literal["linear", "slerp", "ties", "dare"] = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    force: bool = False,
    operation: OperationOptions = OperationOptions(),
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Make one adapter of several, each with its weight; a negative one takes away what it learned.

    They are combined in ΔW, never in A and B apart. linear and slerp are exact without --rank; ties
    (arXiv:2306.01708) and dare (arXiv:2311.03099) change single entries of ΔW.

    Args:
        rank: of the new adapter, by the nearest product of that rank; the report has each layer's
            error
        density: the share of entries that ties and dare keep
        seed: of dare's draws
        force: take adapters that were made for another base, with a warning
    """
    from nanogpt_surgery.surgery import combine as combined

    weights, folders = weighted_folders(adapters, MADE)
    how: dict[str, Any] = {"method": method, "rank": rank, "density": density, "seed": seed}
    report = operation.carry_out(
        _base_of(next(iter(folders.values())), base),
        lambda model, _, **more: combined(model, weights, MADE, **how, **more),
        adapters=folders,
        made=MADE,
        force=force,
    )
    show(report, json, all_layers)


def compress(
    adapter: Adapter,
    *,
    base: Base = None,
    rank: int | None = None,
    energy: float | None = None,
    intruders: float | None = None,
    force: bool = False,
    operation: OperationOptions = OperationOptions(),
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Make an adapter smaller, or take its intruder dimensions out; in place without --out.

    In place the folder changes in one step, and surgery undo brings every byte back.

    Args:
        rank: of each layer's update
        energy: the least share of each ‖ΔW‖² that is kept, by as small a rank as that allows
        intruders: the share that stays of each intruder dimension (arXiv:2410.21228); 0 takes them
            out
        force: take an adapter that was made for another base, with a warning
    """
    from nanogpt_surgery import surgery

    if intruders is not None and (rank is not None or energy is not None):
        raise SurgeryError("--intruders stands alone", "compress the result once more")
    make: Any = surgery.compress if intruders is None else surgery.remove_intruders
    how = {"rank": rank, "energy": energy} if intruders is None else {"keep": intruders}
    _, folders = weighted_folders([str(adapter)], MADE)
    name = next(iter(folders))
    report = operation.carry_out(
        _base_of(adapter, base),
        lambda model, _, **more: make(model, name, MADE, **how, **more),
        adapters=folders,
        made=MADE,
        in_place=adapter,
        force=force,
    )
    show(report, json, all_layers)


def extract(
    base: Model,
    tuned: Model,
    *,
    rank: int | None = None,
    energy: float | None = None,
    operation: OperationOptions = OperationOptions(),
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Make an adapter of what sets a fine-tuned model apart from its base, by SVD.

    Biases go along, and norms are replaced whole. What the format has no place for is named, with
    its size. The logits of base and adapter are compared with the fine-tuned model's.

    Args:
        rank: of each layer's update
        energy: the least share of each difference's ‖·‖² that is kept
    """
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.surgery import extract as extracted

    other, _ = open_model(tuned, "each")
    report = operation.carry_out(
        base,
        lambda model, _, **more: extracted(model, other, MADE, rank=rank, energy=energy, **more),
        made=MADE,
    )
    show(report, json, all_layers)


def ablate(
    model: Operand,
    *,
    heads: Annotated[list[str] | None, Several] = None,
    neurons: Annotated[list[str] | None, Several] = None,
    direction: Path | None = None,
    layers: Annotated[list[int] | None, Several] = None,
    operation: OperationOptions = OperationOptions(),
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Take heads, neurons or a direction out of a model: by an adapter, or in place without --out.

    With --out it is an adapter like any other: it is scaled, blended, merged, and other programs
    open it. In place it goes into the weights, and surgery undo brings every byte back.

    Args:
        heads: LAYER:HEADS, as 3:0,2,5-7
        neurons: LAYER:NEURONS of the feed-forward's inner activations, in the same form
        direction: a file of surgery model direction; no block writes along it any more
        layers: in which the direction is cut; all by default
    """
    from nanogpt_surgery.surgery import ablate as ablated

    what: dict[str, Any] = {
        "heads": _numbers_by_layer(heads, "heads"),
        "neurons": _numbers_by_layer(neurons, "neurons"),
        "direction": None if direction is None else _one_vector(direction),
        "layers": layers,
        "merge": operation.out is None,
    }
    report = operation.carry_out(
        model,
        lambda network, _, **more: ablated(network, MADE, **what, **more),
        made=operation.made,
    )
    show(report, json, all_layers)


def _one_vector(path: Path) -> Any:
    """Returns the vector of a file of a direction.

    Raises:
        SurgeryError: it is no such file, or has one for each of several points.
    """
    from nanogpt_surgery.formats.direction_file import load_direction

    vectors = load_direction(path).vectors
    if len(vectors) != 1:
        raise SurgeryError(f"{path} has directions at {len(vectors)} points; one can be cut out")
    return next(iter(vectors.values()))


def _base_of(adapter: Path, base: str | None) -> str:
    """The base that is named, or the one that an adapter names, where it is there.

    Raises:
        SurgeryError: it names none, or it is elsewhere.
    """
    from nanogpt_surgery.files.writing import read_json
    from nanogpt_surgery.formats.peft.reading import adapter_folder

    if base is not None:
        return base
    folder = adapter_folder(adapter)
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).exists():
        raise SurgeryError(f"{folder} does not say where its base is here", "name it with --base")
    return named


def _numbers_by_layer(written: list[str] | None, what: str) -> dict[int, list[int]] | None:
    """Returns the numbers that texts as 3:0,2,5-7 mean, by layer.

    Raises:
        SurgeryError: a text is of another form.
    """
    if written is None:
        return None
    found: dict[int, list[int]] = {}
    for text in written:
        if not re.fullmatch(r"\d{1,6}:\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", text):
            raise SurgeryError(f"{text!r} does not say which {what}", f"--{what} 3:0,2,5-7")
        layer, _, numbers = text.partition(":")
        for part in numbers.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            if len(span) > 1_000_000:
                raise SurgeryError(f"{part} means {len(span):,} {what}", "at most a million")
            found.setdefault(int(layer), []).extend(span)
    return found
