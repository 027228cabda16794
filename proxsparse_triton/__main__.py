"""`pst`, and `python -m proxsparse_triton`: signals are heard before anything that takes time is imported."""

from __future__ import annotations

from typing import NoReturn

from . import interrupts


def main() -> NoReturn:
    """The command line as a process of its own."""
    interrupts.listen()
    try:
        from .process import run
    except interrupts.Interrupted:
        from .process import run  # which says so

    def command() -> None:
        from .cli import main as group

        group.main()

    run(command)


if __name__ == "__main__":
    main()
