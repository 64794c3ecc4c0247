"""The exceptions that users meet."""


class UserError(ValueError):
    """A mistake of the user's: bad key, missing file, wrong type, unknown name.

    The message is one line that names the thing, its value and what is allowed. The command line prints it and exits
    with code 2; in the library it is a plain ``ValueError``.
    """


class RunFailed(RuntimeError):  # noqa: N818 - it is an end of a run, as Interrupted is
    """What ends a run that is nobody's mistake: a full disk, a loss that stays not finite.

    The message is one line that says what is left and how to go on. The command line prints it and exits with code 1.
    """
