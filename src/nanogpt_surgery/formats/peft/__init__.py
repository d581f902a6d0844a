"""Adapters as PEFT writes them, and for other programs."""
