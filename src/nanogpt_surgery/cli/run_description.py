"""What determines a run: what was asked for, and hashes of what it learns from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.cli.framework.typed_command import typed_command

if TYPE_CHECKING:
    from torch import Tensor

    from nanogpt_surgery.cli.job import Job
    from nanogpt_surgery.data.batches import Batches


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """The sha256 of tensors, one after the other."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _data_fingerprint(data: Batches) -> Any:
    """What tells data from other data: a hash, known already of files, or those of the sources."""
    from nanogpt_surgery.data.text.mixture import Mixture

    if isinstance(data, Mixture):
        return {"rows": data.counts, "sources": [_data_fingerprint(s) for s in data.sources]}
    known = getattr(data, "fingerprint", None)
    return known or fingerprint(tensor for batch in data.whole(1024) for tensor in batch)


def description_of(job: Job, environment: dict[str, Any]) -> dict[str, Any]:
    """What determines a run, for a resumed one to be compared with, and what was typed for it."""
    return {
        **job.description,
        "typed": typed_command(),
        "environment": environment,
        "named": job.named,
        "settings": job.settings.to_dict(),
        "block_size": job.dataset.block_size,
        "train_ids": _data_fingerprint(job.dataset),
        "validation_ids": _data_fingerprint(job.validation),
    }
