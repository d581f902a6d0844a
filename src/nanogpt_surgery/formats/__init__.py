"""How a model lies on disk: name maps and conversions, nothing else."""
