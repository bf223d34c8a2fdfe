"""The refusal to copy or pickle what belongs to one process."""

from typing import NoReturn

__all__ = ["refuse_copy"]


def refuse_copy(thing: object) -> NoReturn:
    """Raise the TypeError of `__getstate__`, which `copy` and `pickle` call: a copy would share locks and connections.

    Raises: TypeError.
    """
    name = type(thing).__name__
    raise TypeError(
        f"expected a {name} to stay in its process, got one that is to be copied or pickled: it has locks, connections "
        "or entries of its own; pass the arguments that it is constructed with instead, and construct another one there"
    )
