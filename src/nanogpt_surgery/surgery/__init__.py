"""Operations beside LoRA's own, each an adapter in the journal, measured and undone."""

from nanogpt_surgery.surgery.ablation import ablate
from nanogpt_surgery.surgery.adapters import combine, compress, extract

__all__ = ["ablate", "combine", "compress", "extract"]
