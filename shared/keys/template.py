"""Templates of keys and tags: `product:{id}`."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from operator import attrgetter
from string import Formatter
from typing import Any, Final, NamedTuple

from ..errors import InvalidName, InvalidSettings
from ..invalidation import KEY_BYTES_MAX, TAG_BYTES_MAX, check_text
from .text import Unstable, text_of

__all__ = ["Field", "Template", "bounded", "key_of", "tag_of"]

_HASHED: Final = "%#"
_DIGEST_CHARACTERS: Final = 64


class Field(NamedTuple):
    """A field of a template: `{product.id}` has the name `product` and the attributes `id`."""

    name: str
    attributes: str

    def __str__(self) -> str:
        return f"{{{self.name}.{self.attributes}}}" if self.attributes else f"{{{self.name}}}"


class Template:
    """A text with fields, which values fill so that no two sets of values give the same text.

    Shape:  `texts` stand around the `fields`, so they are one more. What separates two fields is escaped in all values,
            and so is `:`. `where` is named in errors.
    Units:  a text of more than `bytes_max` bytes of UTF-8 ends with its SHA-256 from there on.
    Raises: InvalidSettings when built.
    """

    def __init__(
        self, template: str, *, typed: bool = False, bytes_max: int = KEY_BYTES_MAX, where: str = "key_of"
    ) -> None:
        self.template: Final = template
        self.typed: Final = typed
        self.bytes_max: Final = bytes_max
        self.where = where
        self.texts: tuple[str, ...]
        self.fields: tuple[Field, ...]
        self.texts, self.fields = self._parsed()
        self.names: Final = tuple(dict.fromkeys(field.name for field in self.fields))
        between = "".join(self.texts[1:-1])
        others = sorted({each for each in between if not each.isalnum()} - {":"})
        self.separators: Final = "%:" + "".join(others)

    def fill(self, values: Iterable[Any]) -> str:
        """Return the text with a value for each of `fields`. Raises: InvalidName."""
        filled = [self.texts[0]]
        for field, value, text in zip(self.fields, values, self.texts[1:], strict=True):
            try:
                filled += (text_of(value, self.separators, typed=self.typed), text)
            except (Unstable, RecursionError):
                raise InvalidName(
                    f"{self.where}: expected a value with a stable text for {field} of {self.template!r}, got an "
                    f"object of type {type(value).__qualname__}; name an attribute in the template, e.g. "
                    f"{{{field.name}.id}}, pass such an attribute, or use a key function"
                ) from None
        return bounded("".join(filled), self.bytes_max)

    def _parsed(self) -> tuple[tuple[str, ...], tuple[Field, ...]]:
        if not isinstance(self.template, str):
            raise self._invalid("a template as a string", type(self.template).__name__)
        texts, fields = [""], list[Field]()
        try:
            parts = list(Formatter().parse(self.template))
        except ValueError as error:
            raise self._invalid("fields in braces, {id}, and {{ for a brace", str(error)) from None
        for text, name, format_spec, conversion in parts:
            texts[-1] += text
            if name is None:
                continue
            if format_spec or conversion or not all(map(str.isidentifier, name.split("."))):
                raise self._invalid("fields that name a value or its attribute, {product.id}", f"{{{name}…}}")
            if fields and not any(not each.isalnum() for each in texts[-1]):
                raise self._invalid(
                    f"a separator such as ':' between {fields[-1]} and {{{name}}}, or their values could be confused",
                    repr(texts[-1]),
                )
            named, _, attributes = name.partition(".")
            fields.append(Field(named, attributes))
            texts.append("")
        if any("%" in text for text in texts):
            raise self._invalid("no '%' outside of braces: it begins an escape", "one")
        if len(self.template.encode(errors="surrogatepass")) > self.bytes_max - _DIGEST_CHARACTERS - len(_HASHED):
            raise self._invalid(f"at most {self.bytes_max - 66} bytes of UTF-8", "more")
        try:
            check_text(self.template, self.bytes_max, "the template")
        except ValueError as error:
            raise self._invalid("text", str(error)) from None
        return tuple(texts), tuple(fields)

    def _invalid(self, expected: str, got: str) -> InvalidSettings:
        return InvalidSettings(f"{self.where}: expected {expected}, got {got} in the template {self.template!r:.100}")


def bounded(text: str, bytes_max: int = KEY_BYTES_MAX) -> str:
    """Return a text that fits: the SHA-256 of a longer one takes the place of what is beyond the limit."""
    if 4 * len(text) <= bytes_max:
        return text
    encoded = text.encode(errors="surrogatepass")
    if len(encoded) <= bytes_max:
        return text
    kept = encoded[: bytes_max - len(_HASHED) - _DIGEST_CHARACTERS].decode(errors="ignore")
    return f"{kept}{_HASHED}{hashlib.sha256(encoded).hexdigest()}"


def key_of(template: str, /, *, typed: bool = False, **values: object) -> str:
    """Return the key that the decorator `cached` makes of a template and these values: `key_of("product:{id}", id=42)`.

    No two sets of values give one key: what separates fields is escaped in values, `%3A` for `:`. Values count as their
    text, so 1 and "1" give the same key, unless `typed`. The grammar: docs/decorator.md.

    Shape:  a value for each field, and no other. A field may name an attribute: `{product.id}`.
    Units:  a key of more than 1,024 bytes of UTF-8 ends with a hash.
    Raises: InvalidSettings; InvalidName when a value has no stable text.
    """
    return _filled(_template(template, typed=typed, bytes_max=KEY_BYTES_MAX, where="key_of"), values)


def tag_of(template: str, /, *, typed: bool = False, **values: object) -> str:
    """Return a tag, by the same grammar as `key_of`. A tag of more than 256 bytes of UTF-8 ends with a hash."""
    return _filled(_template(template, typed=typed, bytes_max=TAG_BYTES_MAX, where="tag_of"), values)


@lru_cache(maxsize=1_024)
def _template(template: str, *, typed: bool, bytes_max: int, where: str) -> Template:
    return Template(template, typed=typed, bytes_max=bytes_max, where=where)


def _filled(template: Template, values: dict[str, object]) -> str:
    if values.keys() != set(template.names):
        raise InvalidSettings(
            f"{template.where}: expected values for {_shown(template.names)} of the template {template.template!r}, "
            f"got {_shown(values)}"
        )
    return template.fill(value_of(field, values[field.name]) for field in template.fields)


def value_of(field: Field, value: object) -> object:
    """Return what a field names of a value."""
    return attrgetter(field.attributes)(value) if field.attributes else value


def _shown(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
