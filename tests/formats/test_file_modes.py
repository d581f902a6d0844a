"""Files are as open to others as the umask lets any new file be, whichever library wrote them."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.adapters import adapted
from helpers.models import FAMILY_CONFIGS, tiny_model

from nanogpt_surgery import SimpleGPT, save_adapter, save_gguf, save_model
from nanogpt_surgery.formats.peft.export import save_lora_gguf, save_mlx_adapter

CONFIG = FAMILY_CONFIGS["llama"]


def plain() -> SimpleGPT:
    return tiny_model(CONFIG)


def with_lora() -> SimpleGPT:
    return adapted(CONFIG, targets=r".*q_proj")


@pytest.mark.filterwarnings("ignore:no tokenizer was written")
@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.parametrize(
    ("save", "model"),
    [
        (save_model, plain),
        (save_gguf, plain),
        (save_adapter, with_lora),
        (save_lora_gguf, with_lora),
        (save_mlx_adapter, with_lora),
    ],
)
def test_every_file_has_the_mode_that_the_umask_gives(
    save: Callable[[SimpleGPT, Path], object],
    model: Callable[[], SimpleGPT],
    umask: int,
    tmp_path: Path,
) -> None:
    before = os.umask(umask)
    try:
        save(model(), tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").exists()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files}
    assert modes == dict.fromkeys(modes, oct(0o666 & ~umask))
