"""The command line: one function a command. Nothing here loads torch before a command runs."""

from __future__ import annotations


def main() -> None:
    """The console script `surgery`."""
    from nanogpt_surgery.cli.framework.signals import AnsweredSignals

    with AnsweredSignals():
        from nanogpt_surgery.cli.framework.app import run
        from nanogpt_surgery.cli.framework.console import ready_streams

        ready_streams()
        run()
