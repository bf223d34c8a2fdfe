"""What the publisher's API and a replica's endpoint do alike with a request: tokens, limits of bodies, problems."""

from collections.abc import AsyncIterator

import msgspec
import pytest

from broadcache.shared.process.bodies import read_at_most
from broadcache.shared.process.problems import BasicProblem, problem_type
from broadcache.shared.process.tokens import Tokens

TOKENS = Tokens(("writer", "ro:reader"))


@pytest.mark.parametrize(
    ("values", "right"),
    [
        ([b"Bearer writer"], "rw"),
        ([b"bearer  reader "], "ro"),
        ([b"Bearer stranger"], None),
        ([b"Basic writer"], None),
        ([b"writer"], None),
        ([], None),
        ([b"Bearer writer", b"Bearer writer"], None),
    ],
)
def test_exactly_one_authorization_header_with_a_valid_token_gives_its_right(
    values: list[bytes], right: str | None
) -> None:
    headers = [(b"host", b"x"), *((b"authorization", value) for value in values)]
    assert TOKENS.authorize(headers) == (right, len(values))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("chunks", "body", "read"),
    [
        ([b""], b"", 1),
        ([b"abc", b""], b"abc", 2),
        ([b"a", b"bc"], b"abc", 2),
        ([b"abcd", b"e"], b"abcd", 1),
        ([b"ab", b"cdef", b"g"], b"abcd", 2),
    ],
)
async def test_a_body_is_read_until_it_is_one_byte_too_long(chunks: list[bytes], body: bytes, read: int) -> None:
    count = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal count
        for chunk in chunks:
            count += 1
            yield chunk

    assert await read_at_most(counted(), 3) == body
    assert count == read


def test_a_problem_document_has_its_four_fields_in_order() -> None:
    problem = BasicProblem(type=problem_type("cross-site"), title="No", status=403, detail="expected …")
    assert msgspec.json.encode(problem).decode() == (
        '{"type":"urn:broadcache:problem:cross-site","title":"No","status":403,"detail":"expected …"}'
    )
