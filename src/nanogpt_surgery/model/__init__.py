"""The anatomy: every part of the GPT, by hand, in torch alone."""
