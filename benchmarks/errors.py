"""The one exception for what the user of a command got wrong."""


class InputError(ValueError):
    """An input that cannot be used; the message is for whoever typed the command."""
