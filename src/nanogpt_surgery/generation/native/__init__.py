"""The compiled decoder: one token a step, computed by C."""
