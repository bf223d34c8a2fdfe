"""Keeps secrets that were typed in the wrong place out of error texts: a URL as a namespace, a token as a port."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from typer.core import TyperGroup

__all__ = ["MaskingGroup", "masked"]

_SECRET_OPTIONS: Final = ("--redis-url", "--token", "--header", "-H", "--source-url")
_SECRET_VALUE: Final = re.compile(r"://|@|^r[ow]:|bearer |authorization", re.IGNORECASE)
_EXTRA_ARGUMENTS: Final = re.compile(r"(unexpected extra argument\S*) \(.*\)", re.DOTALL)
_BEGIN_CHARACTERS: Final = 16
"""An error may show a long value shortened: so much of its begin is recognised."""


def masked(text: str, arguments: Sequence[str]) -> str:
    """Return `text` with … for each of a command's arguments that may contain a secret."""
    text = _EXTRA_ARGUMENTS.sub(r"\1", text)
    for form in sorted(_forms_of(arguments), key=len, reverse=True):
        text = text.replace(form, "…")
        if len(form) > _BEGIN_CHARACTERS and (found := text.find(form[:_BEGIN_CHARACTERS])) >= 0:
            text = f"{text[:found]}…"
    return text


def _forms_of(arguments: Sequence[str]) -> set[str]:
    """Return each argument that may contain a secret, as it is and as errors quote it."""
    forms: set[str] = set()
    is_secret = False
    for argument in arguments:
        name, equals, value = argument.partition("=") if argument.startswith("--") else (argument, "", argument)
        if argument.startswith("-H"):
            value, is_secret = argument[2:], is_secret or bool(argument[2:])
        if is_secret or (equals and name in _SECRET_OPTIONS) or _SECRET_VALUE.search(value):
            forms |= {value, repr(value)[1:-1], ascii(value)[1:-1]}
        is_secret = argument in _SECRET_OPTIONS
    return forms - {""}


class MaskingGroup(TyperGroup):
    """Commands whose errors about what was typed do not repeat secrets."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **more: Any) -> Any:
        """Read the options of the group."""
        given = list(args)
        with _masking(given):
            context = super().make_context(info_name, args, *rest, **more)
        context.meta[__name__] = given
        return context

    def invoke(self, ctx: Any) -> Any:
        """Run the command, which reads its own options."""
        with _masking(ctx.meta[__name__]):
            return super().invoke(ctx)


@contextmanager
def _masking(arguments: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Which class it is depends on the version of Typer: it brings an argument parser of its own, or takes Click.
        if hasattr(error, "format_message") and isinstance(message := getattr(error, "message", None), str):
            error.message = masked(message, arguments)  # type: ignore[attr-defined]
        raise
