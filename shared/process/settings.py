"""Settings: read from arguments or the environment, checked once, secrets never printed."""

import difflib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Final, Literal, TypeVar, get_args, get_origin

import msgspec

from ..errors import InvalidSettings

__all__ = ["VARIABLE_PREFIX", "Settings", "read_settings", "variable_of"]

VARIABLE_PREFIX: Final = "BROADCACHE_"

logger: logging.Logger = logging.getLogger("broadcache.settings")

# For a Service called `broadcache` or `broadcache-…`, Kubernetes sets such variables in every pod of its namespace.
# The user did not choose them, so there is no warning. For the same reason no setting may have a name of this form:
# `BROADCACHE_PORT` would be read as a port number, and hold `tcp://10.0.0.1:8000`.
_SERVICE_LINK_NAME = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_.+)?)")
_SERVICE_LINK_VALUES: Final = ("tcp://", "udp://", "sctp://")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The base of each role's settings. A field's `Meta` has its bounds and, in `description`, its unit and purpose.

    The value of a field marked `Meta(extra={"secret": True})` is never shown: not in `repr`, not in an error.
    Raises: InvalidSettings, at construction.
    """

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(self):
            problem = ""
            try:
                msgspec.convert(getattr(self, field.name), field.type)
            except msgspec.ValidationError as error:
                problem = str(error)
            if problem:  # raised here, since the other error may quote the value
                raise _invalid(field, field.name, problem, getattr(self, field.name))
            if not _is_secret(field) and _has_password(getattr(self, field.name)):
                # It would be shown: in `repr`, in errors, in logs.
                raise InvalidSettings(
                    f"{variable_of(field.name)}: expected no URL with a user and a password, got one (not shown); put "
                    "it where it belongs, or leave it out"
                )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={shown!r}' for name, shown in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [
            (field.name, _MASKED if _is_secret(field) else getattr(self, field.name))
            for field in msgspec.structs.fields(self)
        ]


class _Masked:
    def __repr__(self) -> str:
        return "…"


_MASKED: Final = _Masked()


S = TypeVar("S", bound=Settings)


def read_settings(
    kind: type[S], environ: Mapping[str, str], *, read_elsewhere: Collection[str] = (), **overrides: object
) -> S:
    """Create settings of this kind: from `overrides` first, then the environment, then the defaults.

    Shape:  `max_staleness_seconds` is read from `BROADCACHE_MAX_STALENESS_SECONDS`; commas separate a tuple's items.
            An empty variable counts as unset, since compose files write unset variables so. An override of None also
            counts as unset, since it is an option missing on the command line. `read_elsewhere` names the variables
            that other parts of this process read.
    Raises: InvalidSettings. An unknown `BROADCACHE_` variable is logged as a warning, with the most similar name.
    """
    values: dict[str, object] = {name: value for name, value in overrides.items() if value is not None}
    for field in msgspec.structs.fields(kind):
        text = environ.get(variable_of(field.name), "").strip()
        if text and field.name not in values:
            values[field.name] = _converted(field, text)
        if field.required and field.name not in values:
            raise InvalidSettings(f"{variable_of(field.name)}: expected a value, got none; set it")
    _warn_of_unknown(environ, read_elsewhere)
    return kind(**values)


def variable_of(field_name: str) -> str:
    """Return the environment variable that a field is read from."""
    return VARIABLE_PREFIX + field_name.upper()


def _converted(field: msgspec.structs.FieldInfo, text: str) -> object:
    value = _items(text) if _is_tuple(field.type) else text
    try:
        converted: object = msgspec.convert(value, field.type, strict=False)
        return converted
    except msgspec.ValidationError as error:
        problem = str(error)
    raise _invalid(field, variable_of(field.name), problem, text)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _invalid(field: msgspec.structs.FieldInfo, name: str, problem: str, got: object) -> InvalidSettings:
    problem, _, place = problem.partition(" - at ")
    # The second half, "got `str`", is true of every variable: its value is more useful.
    expected = problem.partition(", got")[0].replace("`", "").replace("Expected", "expected")
    expected = expected.replace("bool", "true or false")
    choices = _choices(field.type)
    if choices:
        expected = f"expected one of {', '.join(map(str, choices))}"
    got_text = repr(got)
    if _is_secret(field) or _has_password(got):
        got_text = "a secret value, which is not shown"
    index = re.search(r"\d+", place)
    where = f" as item {int(index[0]) + 1}" if index else ""
    return InvalidSettings(f"{name}: {expected}{where}, got {got_text}; {_remedy(field)}")


def _remedy(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "correct it"
    return "correct it, or leave it out" if _is_secret(field) else f"correct it, or leave it out for {field.default!r}"


def _is_secret(field: msgspec.structs.FieldInfo) -> bool:
    return any(isinstance(meta, msgspec.Meta) and (meta.extra or {}).get("secret") for meta in get_args(field.type))


def _has_password(value: object) -> bool:
    """Whether a value is a URL with user and password, or one that is misspelt so that it may be."""
    if isinstance(value, str):
        return "://" in value and "@" in value
    return isinstance(value, tuple | list) and any(map(_has_password, value))


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _is_tuple(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_origin(annotation) is tuple


def _warn_of_unknown(environ: Mapping[str, str], read_elsewhere: Collection[str]) -> None:
    # The prefix is read with the Redis URL, by every role.
    known = {*read_elsewhere, f"{VARIABLE_PREFIX}PREFIX"} | {
        variable_of(field.name) for kind in _kinds(Settings) for field in msgspec.structs.fields(kind)
    }
    for name in sorted(environ):
        if name.startswith(VARIABLE_PREFIX) and name not in known and not _is_service_link(name, environ[name]):
            nearest = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {nearest[0]}?" if nearest else f"the known ones are {', '.join(sorted(known))}"
            logger.warning("%s is not a known setting and has no effect; %s", name, advice)


def _kinds(kind: type[Settings]) -> Iterator[type[Settings]]:
    """Yield the settings of all loaded roles: in a shared environment, a variable of another role is no mistake."""
    yield kind
    for narrower in kind.__subclasses__():
        yield from _kinds(narrower)


def _is_service_link(name: str, value: str) -> bool:
    return value.startswith(_SERVICE_LINK_VALUES) or _SERVICE_LINK_NAME.fullmatch(name) is not None
