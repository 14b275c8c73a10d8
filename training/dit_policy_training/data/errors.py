"""What goes wrong with a dataset, in words."""


class DatasetError(ValueError):
    """Not a sound dataset, or not what was asked for; the message says what was found, where, and what to do."""
