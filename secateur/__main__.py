"""``secateur`` and ``python -m secateur`` are the command line; Ctrl-C is one line from its first import on."""

import os
import signal
import sys
from types import FrameType


def _leave(_number: int, _frame: FrameType | None) -> None:
    # An exception in the middle of an import may come out as any other, or with a page of traceback.
    os.write(2, b"error: interrupted.\n")
    os._exit(130)


def main() -> int:
    """Run the command line and return its exit status."""
    before = signal.signal(signal.SIGINT, _leave)
    from secateur.cli.commands import main as run

    signal.signal(signal.SIGINT, before)
    return run()


if __name__ == "__main__":
    sys.exit(main())
