"""Equal numbers, only sooner: nothing here is needed to train."""
