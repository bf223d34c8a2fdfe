"""The failure of a load that several callers wait for: each of them gets an exception of its own."""

from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any, Final, TypeVar

__all__ = ["Failure", "copied"]

E = TypeVar("E", bound=BaseException)

_HEAP_TYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that a class statement, or an extension at run time, made


class Failure:
    """What a loader raised, and where.

    An exception object has one traceback, which grows wherever it is raised. If 60 threads raised the same object, each
    would print the frames of all. So the caller whose load it was raises the loader's exception, and any other a copy:
    of the same type, with the same arguments, attributes and notes, and the traceback of the loader.
    """

    def __init__(self, error: BaseException) -> None:
        self.error: Final = error
        self._trace = error.__traceback__
        self._pristine = copied(error)  # before a caller raises it

    def of_joined_caller(self) -> BaseException:
        """Return the exception for a caller that joined the load. One that cannot be copied is shared."""
        own = None if self._pristine is None else copied(self._pristine)
        return (own or self.error).with_traceback(self._trace)


def copied(error: E) -> E | None:
    """Return a copy without a traceback; None if some of the exception's state cannot be copied.

    `copy.copy` would call the class with `args` once more: many classes take other arguments than they hand on.
    """
    kind = type(error)
    builtin: Any = next(each for each in kind.__mro__ if not each.__flags__ & _HEAP_TYPE)
    if builtin.__module__ != "builtins":
        return None  # an extension's: it may hold what no attribute shows
    try:
        own: E = builtin.__new__(kind, *error.args)
        if type(own) is not kind:
            return None
        own.args = error.args
        for name, value in _slots_of(error).items():
            if getattr(own, name, None) != value:  # an exception group has its parts already, and refuses them
                setattr(own, name, value)
        own.__dict__.update(error.__dict__)
    except Exception:  # noqa: BLE001  (an extension's class, or a user's own __setattr__)
        return None
    if (notes := own.__dict__.get("__notes__")) is not None:
        own.__dict__["__notes__"] = list(notes)
    own.__cause__, own.__context__ = error.__cause__, error.__context__
    own.__suppress_context__ = error.__suppress_context__
    return own


def _slots_of(error: BaseException) -> dict[str, Any]:
    """The attributes that are not in the exception's `__dict__`: `errno` of an OSError, and those of `__slots__`."""
    slots: dict[str, Any] = {}
    for kind in type(error).__mro__:
        if kind is BaseException:
            break
        for name, descriptor in vars(kind).items():
            if isinstance(descriptor, MemberDescriptorType | GetSetDescriptorType) and not name.startswith("__"):
                try:
                    slots.setdefault(name, getattr(error, name))
                except AttributeError:  # not set
                    continue
    return slots
