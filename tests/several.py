"""What `test_distributed` has several processes do; torchrun starts it.

torchrun --standalone --nproc-per-node 2 tests/several.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from ways import WAYS, first_rows, trained

from nanogpt_surgery import SimpleGPT, fit
from nanogpt_surgery.training.distributed import joined

FLOAT32 = {"device": "cpu", "precision": "float32"}


def dropout(seed: int, accumulation: int, batch_size: int) -> tuple[SimpleGPT, list[float]]:
    """A training with dropout in which a process can be without a token that is trained on."""
    torch.manual_seed(seed)
    model = SimpleGPT(53, 24, 3, 2, 19, dropout=0.3)
    sizes = {"accumulation": accumulation, "batch_size": batch_size}
    steps = fit(model, first_rows(), max_steps=4, learning_rate=1e-2, **sizes, **FLOAT32)
    return model, [step.loss for step in steps]


def main(folder: Path) -> None:
    """Train in every way; each process writes its weights and what its steps said."""
    found = {}
    with joined() as world:
        for way in WAYS:
            model, steps = trained(way, torch.float32, **FLOAT32)
            found[way] = model, [step.to_dict() for step in steps]
        found["dropout"] = dropout(seed=world.rank, accumulation=2, batch_size=4)
        for way, (model, said) in found.items():
            name = folder / f"{way}-{world.rank}"
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            save_file(weights, name.with_suffix(".safetensors"))
            name.with_suffix(".json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
