"""A training run on disk: begun, saved, resumed, summarised."""
