"""The one exception for what a user can fix, and how its message quotes text from elsewhere."""

_LONGEST = 200


class InputError(ValueError):
    """An input cannot be used. The message says what, where and what to do.

    The command line prints it as one line, `error: ...`, and exits with status 2.
    """


def one_line(error: object) -> str:
    """An error, or a name from a file, as printable text on one line, about 200 characters at most."""
    return _bounded(" ".join(str(error).split()) or type(error).__name__)


def shown(value: object) -> str:
    """A value from a file as its `repr`, on one line, about 200 characters at most."""
    return _bounded(repr(value))


def _bounded(text: str) -> str:
    short = text if len(text) <= _LONGEST else text[: _LONGEST - 4].rstrip() + " ..."
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in short)
