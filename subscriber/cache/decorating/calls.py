"""The key and the tags of a call, from templates or from a key function."""

import inspect
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, Final

from ....shared.errors import InvalidName, InvalidSettings
from ....shared.invalidation import TAG_BYTES_MAX
from ....shared.keys.template import Field, Template, bounded, value_of
from ..checks import Names, Ttl, checked_key, checked_tags, checked_ttl

__all__ = ["CallPlan"]

_CHARACTERS_MAX: Final = 256
"""A key of so many characters is within 1,024 bytes, whatever these are."""


class CallPlan:
    """What is cached of a function's calls: under which key, with which tags, and for how long.

    Shape:  `key_of` and `tags_of` are called with the arguments of the call. A function that is called as a method has
            `key_of_method`, whose first argument is the object: a template may name an attribute of it, a key function
            is not given it.
    Raises: InvalidSettings, InvalidName when built.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        key: str | Callable[..., str],
        *,
        tags: Names,
        ttl_seconds: Ttl,
        typed: bool,
    ) -> None:
        self.name: Final = _name_of(function)
        self.is_async: Final = _checked_function(function, self.name)
        self._first: tuple[object, ...] = ()
        self.ttl_seconds: Final = checked_ttl(ttl_seconds)
        self._tags: Final = [
            Template(tag, typed=typed, bytes_max=TAG_BYTES_MAX, where=f"a tag of {self.name}()")
            for tag in checked_tags(tags)
        ]
        try:
            self._signature = inspect.signature(function)
        except (TypeError, ValueError):
            raise InvalidSettings(
                f"expected a function with a signature, got {self.name}, which has none; wrap it in a function"
            ) from None
        for template in self._tags:
            self._check_fields(template)
        self.key_of: Callable[..., str]
        self.key_of_method: Callable[..., str]
        if isinstance(key, str):
            self.key_of = self.key_of_method = self._template_key(key, typed=typed)
        else:
            self.key_of = self._checked(key, typed=typed)
            self.key_of_method = self._without_self(self.key_of)

    def tags_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        """Return the tags of a call. Raises: InvalidName."""
        if not self._tags:
            return ()
        call = self._signature.bind(*self._first, *args, **kwargs)
        call.apply_defaults()
        return tuple(
            template.fill(value_of(field, call.arguments[field.name]) for field in template.fields)
            for template in self._tags
        )

    def of(self, instance: object) -> "CallPlan":
        """Return the plan of the method of one object."""
        plan = copy(self)
        plan.key_of = partial(self.key_of_method, instance)
        plan._first = (instance,)
        return plan

    def _check_fields(self, template: Template) -> None:
        if unknown := [name for name in template.names if name not in self._signature.parameters]:
            raise InvalidSettings(
                f"expected fields that are parameters of {self.name}{self._signature}, got {{{unknown[0]}}} in "
                f"{template.template!r}"
            )

    def _template_key(self, key: str, *, typed: bool) -> Callable[..., str]:
        template = Template(key, typed=typed, where=f"{self.name}()")
        self._check_fields(template)
        return _compiled(self.name, self._signature, template)

    def _checked(self, key: Any, *, typed: bool) -> Callable[..., str]:
        if typed or not callable(key):
            raise InvalidSettings(
                f"expected a template such as 'product:{{id}}', or a function that returns a key, for {self.name}(), "
                f"got {key!r:.100}{' and typed=True, which is for templates' if typed else ''}"
            )

        def key_of(*args: Any, **kwargs: Any) -> str:
            made: Any = key(*args, **kwargs)
            if type(made) is str and len(made) <= _CHARACTERS_MAX:
                return made
            try:
                return bounded(checked_key(made))
            except InvalidName as error:
                raise InvalidName(f"the key function of {self.name}(): {error}") from None

        return key_of

    @staticmethod
    def _without_self(key_of: Callable[..., str]) -> Callable[..., str]:
        def key_of_method(_self: object, /, *args: Any, **kwargs: Any) -> str:
            return key_of(*args, **kwargs)

        return key_of_method


def _name_of(function: Any) -> str:
    named = function.func if isinstance(function, partial) else function
    return str(getattr(named, "__qualname__", type(named).__qualname__))


def _checked_function(function: Any, name: str) -> bool:
    """Return whether a function is asynchronous. Raises: InvalidSettings when its results cannot be cached."""
    if not callable(function) and not isinstance(function, classmethod | property):
        raise InvalidSettings(
            f"expected a function to cache, got {type(function).__name__}; a decorator needs a key: write "
            "@cache.cached('product:{id}'), not @cache.cached"
        )
    if isinstance(function, staticmethod | classmethod | property):
        raise InvalidSettings(
            f"expected a function to cache, got {type(function).__name__}; put @staticmethod and the like above it"
        )
    for each in (function, getattr(function, "__call__", None)):  # noqa: B004  (an object's own may be a coroutine)
        if inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each):
            raise InvalidSettings(
                f"expected a function that returns a value, got the generator function {name}: its values can be read "
                "only once; return a list"
            )
        if inspect.iscoroutinefunction(each):
            return True
    return False


def _compiled(name: str, signature: inspect.Signature, template: Template) -> Callable[..., str]:
    """Compile a function with this signature that returns the key of a call.

    So Python itself binds the arguments, as quickly as it can: positional, keyword and default arguments give one key.
    Integers and plain texts, which need no escapes, fill the template directly: a negative one does need some where `-`
    separates two fields.
    """
    scope: dict[str, Any] = {
        "_broadcache_fill": template.fill,
        "_broadcache_bounded": bounded,
        "_broadcache_type": type,  # a parameter may be named type, int, str or len
        "_broadcache_int": int,
        "_broadcache_str": str,
        "_broadcache_len": len,
        "_broadcache_error": ValueError,
    }
    values = "".join(f"{_expression(field)}, " for field in template.fields)
    lines = [f"def _broadcache_key({_parameters(signature, scope)}):"]
    if not template.typed and not any(field.attributes for field in template.fields):
        plain = [_is_plain(each, has_sign="-" not in template.separators) for each in template.names]
        fields = zip(template.texts, [*(f"{{{field.name}}}" for field in template.fields), ""], strict=True)
        lines += [
            f"    if {' and '.join(plain) or True}:",
            "        try:",
            f'            key = f"{"".join(_literal(text) + field for text, field in fields)}"',
            f"            return key if _broadcache_len(key) <= {_CHARACTERS_MAX} else _broadcache_bounded(key)",
            "        except _broadcache_error:",  # an integer of very many digits
            "            pass",
        ]
    lines.append(f"    return _broadcache_fill(({values}))")
    exec("\n".join(lines), scope)  # noqa: S102  (of names and numbers, as in namedtuple and dataclass)
    key_of: Callable[..., str] = scope["_broadcache_key"]
    key_of.__name__ = key_of.__qualname__ = name  # named when the arguments do not fit
    return key_of


def _is_plain(name: str, *, has_sign: bool) -> str:
    is_text = f"_broadcache_type({name}) is _broadcache_str and {name}.isalnum() and {name}.isascii()"
    is_integer = f"_broadcache_type({name}) is _broadcache_int{'' if has_sign else f' and {name} >= 0'}"
    return f"({is_integer} or {is_text})"


def _expression(field: Field) -> str:
    return f"{field.name}.{field.attributes}" if field.attributes else field.name


def _literal(text: str) -> str:
    escaped = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return escaped.replace("{", "{{").replace("}", "}}")


def _parameters(signature: inspect.Signature, scope: dict[str, Any]) -> str:
    """Write the parameters as Python. Their defaults go into `scope`."""
    parts: list[str] = []
    kinds = inspect.Parameter
    before: Any = None
    for number, each in enumerate(signature.parameters.values()):
        if before is kinds.POSITIONAL_ONLY and each.kind is not before:
            parts.append("/")
        if each.kind is kinds.KEYWORD_ONLY and before not in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL):
            parts.append("*")
        stars = "*" if each.kind is kinds.VAR_POSITIONAL else "**" if each.kind is kinds.VAR_KEYWORD else ""
        default = ""
        if each.default is not kinds.empty:
            scope[f"_broadcache_default_{number}"] = each.default
            default = f"=_broadcache_default_{number}"
        parts.append(f"{stars}{each.name}{default}")
        before = each.kind
    if before is kinds.POSITIONAL_ONLY:
        parts.append("/")
    return ", ".join(parts)
