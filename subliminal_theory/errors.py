"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Something given cannot be used; the message says what, where and what to do.

    The command line prints it as one line, `error: ...`, and exits with status 2.
    """
