"""`python -m nanogpt_surgery` is `surgery`."""

from __future__ import annotations

from nanogpt_surgery.cli import main

if __name__ == "__main__":  # not in the processes that `surgery data prepare` starts
    main()
