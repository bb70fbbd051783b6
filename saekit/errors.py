"""The one error that a user causes; apart from the other types, which load torch."""


class SaekitError(ValueError):
    """A user's mistake, told in one sentence: the field, the value, and what to do instead."""
