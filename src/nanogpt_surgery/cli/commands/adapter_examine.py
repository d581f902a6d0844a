"""`surgery adapter examine`: the size and the directions of an adapter's updates."""

from __future__ import annotations

from pathlib import Path

from nanogpt_surgery.cli.framework.console import AllLayers, Json, say, show
from nanogpt_surgery.errors import SurgeryError


def examine(
    adapter: Path,
    *,
    base: str | None = None,
    picture: Path | None = None,
    force: bool = False,
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Measure each update of an adapter against the weight that it changes.

    Its size beside W's, of how many directions it is (effective rank; far below the rank, a smaller
    rank would do), how much it turns what W does most (overlap, over chance), new directions among
    W's leading ones (intruders, arXiv:2410.21228), and what of it survives a merge in fewer bits.

    Parameters
    ----------
    adapter
        an adapter folder or a run of finetune
    base
        its model; by default the one that the adapter names
    picture
        a PNG to draw sizes and ranks into
    force
        take an adapter that was made for another base, with a warning
    """
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.formats.peft.reading import adapter_folder, load_adapter
    from nanogpt_surgery.interpret import examine as examined

    folder = adapter_folder(adapter)
    model, _ = open_model(base or _base_of(folder), "each")
    load_adapter(model, folder, force=force)
    report = examined(model)
    if picture is not None:
        from nanogpt_surgery.files.atomic import write_file
        from nanogpt_surgery.interpret.pictures import draw_examination

        write_file(picture, lambda goal: draw_examination(report, goal), magic=b"\x89PNG")
        say(f"wrote {picture}")
    show(report, json, all_layers)


def _base_of(folder: Path) -> str:
    """The base that an adapter names, where it is there.

    Raises:
        SurgeryError: it names none, or it is elsewhere.
    """
    from nanogpt_surgery.files.json_files import read_json

    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).exists():
        raise SurgeryError(f"{folder} does not say where its base is here", "name it with --base")
    return named
