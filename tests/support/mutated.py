"""Methods with a part of their source changed: what a test must catch."""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["mutated"]


def mutated(owner: type, method: str, *changes: tuple[str, str]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what puts a method in place whose source has been changed."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, method)))
    for old, new in changes:
        assert source.count(old) >= 1, f"{owner.__name__}.{method} has no {old!r} any more: change the mutant with it"
        source = source.replace(old, new)
    module = inspect.getmodule(getattr(owner, method))
    assert module is not None

    def break_it(monkeypatch: pytest.MonkeyPatch) -> None:
        scope: dict[str, Any] = {}
        exec(compile(source, f"<mutant of {method}>", "exec"), vars(module), scope)
        monkeypatch.setattr(owner, method, scope[method])

    return break_it
