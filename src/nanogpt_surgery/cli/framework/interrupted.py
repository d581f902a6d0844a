"""Run as a program: a command that sends itself signals after steps of its training.

python -m nanogpt_surgery.cli.framework.interrupted '{"5": 9}' train TEXT --out RUN
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Carry out the command behind the table of signals, by step."""
    from nanogpt_surgery.cli.framework.app import run
    from nanogpt_surgery.runs.checkpoints import RunFolder

    planned = json.loads(sys.argv[1])
    RunFolder.signals_after = {int(step): int(number) for step, number in planned.items()}
    run(sys.argv[2:])


if __name__ == "__main__":
    main()
