"""What can go wrong in a cascade and its evaluation, as one line."""


class CascadeError(Exception):
    """A model, a partner or an evaluation cannot be had as asked; the message says what to do."""
