"""The one exception that users meet."""


class UserError(ValueError):
    """A mistake of the user's: bad key, missing file, wrong type, unknown name.

    The message is one line that names the thing, its value and what is allowed. The command line prints it and exits
    with code 2; in the library it is a plain ``ValueError``.
    """
