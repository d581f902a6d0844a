"""The command line: one function a command. Nothing here loads torch before a command runs."""

from __future__ import annotations

import atexit
import gc


def main() -> None:
    """The console script `surgery`."""
    # What PyTorch makes when it is loaded stays to the end: to look through it often, and once
    # more at the end, takes 0.6 s of a command.
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    from nanogpt_surgery.cli.framework.signals import AnsweredSignals

    with AnsweredSignals():
        from nanogpt_surgery.cli.framework.app import run
        from nanogpt_surgery.cli.framework.console import ready_streams

        ready_streams()
        run()
