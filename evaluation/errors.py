"""The one error type that the command line turns into a message and exit status 2."""


class InputError(ValueError):
    """What the user gave cannot be used; the message names what came and what was expected."""
