"""What `test_distributed` has several processes do; torchrun starts it.

torchrun --standalone --nproc-per-node 2 tests/several.py FOLDER
"""

import json
import sys
import time
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.training_ways import WAYS, first_rows, text, trained
from nanogpt_surgery import SimpleGPT, SurgeryError, fit
from nanogpt_surgery.training.distributed import World, joined

FLOAT32 = {"device": "cpu", "precision": "float32"}
# And how far losses and norms may be off, as a share: bfloat16 rounds each product to 2^-9.
PRECISIONS = {"float32": 1e-4, "bfloat16": 2**-5}


# Rows that are all trained on, and rows of which one process has none that is.
DROPOUT = {"dropout": text, "dropout, first rows": first_rows}


def dropout(
    way: str, seed: int, grad_accum_steps: int, batch_size: int
) -> tuple[SimpleGPT, list[float]]:
    """A training with dropout, from weights that follow from a seed."""
    torch.manual_seed(seed)
    model = SimpleGPT(53, 24, 3, 2, 19, dropout=0.3)
    sizes = {"grad_accum_steps": grad_accum_steps, "batch_size": batch_size}
    steps = fit(model, DROPOUT[way](), max_steps=4, learning_rate=1e-2, **sizes, **FLOAT32)
    return model, [step.loss for step in steps]


def alone(world: World, gone: Path) -> list[str]:
    """What the first process is told by whatever it asks of a second one that has left."""
    while not gone.exists():
        time.sleep(0.01)
    model = SimpleGPT(53, 24, 3, 2, 19)
    asked = (
        lambda: world.broadcast_parameters(model),
        lambda: world.all_reduce_sum(1),
        lambda: world.all_reduce_max(1),
    )
    told = []
    for ask in asked:
        try:
            ask()
        except SurgeryError as error:
            told.append(error.what)
    return told


def main(folder: Path) -> None:
    """Train in every way; each process writes its weights and what its steps said."""
    found = {}
    with joined() as world:
        for way, precision in product(WAYS, PRECISIONS):
            model, steps = trained(way, torch.float32, device="cpu", precision=precision)
            found[f"{way}-{precision}"] = model, [step.to_dict() for step in steps]
        for way in DROPOUT:
            found[way] = dropout(way, seed=world.rank, grad_accum_steps=2, batch_size=4)
        for way, (model, said) in found.items():
            name = folder / f"{way}-{world.rank}"
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            save_file(weights, name.with_suffix(".safetensors"))
            name.with_suffix(".json").write_text(json.dumps(said))
        if world.is_main_process:
            (folder / "told.json").write_text(json.dumps(alone(world, folder / "gone")))
    (folder / "gone").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
