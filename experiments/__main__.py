"""`python -m experiments` in a clone, `subliminal-theory` where the package is installed."""

from typing import NoReturn

from .app import command
from .app.workers import leave


def main() -> NoReturn:
    """Run the command line and end the process with its exit status."""
    leave(command.main())


if __name__ == "__main__":
    main()
