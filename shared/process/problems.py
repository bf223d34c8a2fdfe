"""Problem documents (RFC 9457): the JSON of an error response, of the publisher and of a replica."""

from typing import Final

import msgspec

__all__ = ["PROBLEM_MEDIA_TYPE", "BasicProblem", "problem_type"]

PROBLEM_MEDIA_TYPE: Final = "application/problem+json"


class BasicProblem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fields that every problem document has. `detail` says expected, got, where and what to do."""

    type: str
    title: str
    status: int
    detail: str


def problem_type(name: str) -> str:
    """Return the URI by which programs recognize a kind of problem."""
    return f"urn:broadcache:problem:{name}"
