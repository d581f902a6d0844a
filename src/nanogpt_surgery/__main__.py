"""`python -m nanogpt_surgery` is `surgery`."""

from nanogpt_surgery.cli import main

main()
