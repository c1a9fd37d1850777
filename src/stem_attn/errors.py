"""The error of the command line."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that the command line shows as it is."""
