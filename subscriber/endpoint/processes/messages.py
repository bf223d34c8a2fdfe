"""What the processes of one address say to each other: a question with the posted bytes, and an answer."""

import socket
import struct
from typing import Any, Final

import msgspec

from ....shared.wire import FRAME_BYTES_MAX

__all__ = ["Answer", "Question", "Unreadable", "answer_in", "packed", "packed_answer", "received_question"]

_SIZES: Final = struct.Struct(">4sII")
_MAGIC: Final = b"bch1"
_DOCUMENT_BYTES_MAX: Final = 1_048_576


class Unreadable(Exception):
    """The other process has sent something else, or nothing."""


class Question(msgspec.Struct, frozen=True):
    """The head of a question: do you serve one of these addresses?

    Shape:  `addresses` are names of listeners, `network` is which network they are of. `may_have_twins` is whether
            other sockets may be bound to one of them.
    """

    addresses: tuple[str, ...]
    network: str
    may_have_twins: bool


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of a process.

    Shape:  `is_concerned` is whether it serves one of the addresses, has done so, or may come to: then it has applied
            what was posted. `replicas` maps the ids of its subscribers to their outcomes. `error` says why it has not.
    """

    pid: int
    is_concerned: bool
    outcome: str | None = None
    dropped: int = 0
    replicas: dict[str, str] = {}
    error: str | None = None


_questions: Final = msgspec.json.Decoder(Question)
_answers: Final = msgspec.json.Decoder(Answer)


def packed(question: Question, body: bytes) -> bytes:
    """Return the bytes of a question."""
    return _packed(question, body)


def packed_answer(answer: Answer) -> bytes:
    """Return the bytes of an answer."""
    return _packed(answer, b"")


def received_question(connection: socket.socket) -> tuple[Question, bytes]:
    """Read a question and the posted bytes. Raises: Unreadable; OSError, also when the time is up."""
    sizes = _exactly(connection, _SIZES.size)
    document_bytes, body_bytes = _checked(sizes)
    if body_bytes > FRAME_BYTES_MAX + 1:
        raise Unreadable(f"expected at most {FRAME_BYTES_MAX + 1} posted bytes, got {body_bytes}")
    try:
        question = _questions.decode(_exactly(connection, document_bytes))
    except msgspec.MsgspecError as error:
        raise Unreadable(str(error)) from None
    return question, _exactly(connection, body_bytes)


def answer_in(received: bytes) -> Answer | None:
    """Return the answer in what was received so far; None if it is not whole. Raises: Unreadable."""
    if len(received) < _SIZES.size:
        return None
    document_bytes, _ = _checked(received)
    document = received[_SIZES.size :]
    if len(document) < document_bytes:
        return None
    try:
        return _answers.decode(document)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Unreadable(f"expected the answer of a process of this version, got another one: {error}") from None


def _packed(document: Any, body: bytes) -> bytes:
    encoded = msgspec.json.encode(document)
    return _SIZES.pack(_MAGIC, len(encoded), len(body)) + encoded + body


def _checked(sizes: bytes) -> tuple[int, int]:
    magic, document_bytes, body_bytes = _SIZES.unpack_from(sizes)
    if magic != _MAGIC or document_bytes > _DOCUMENT_BYTES_MAX:
        raise Unreadable("expected a message of a process of this version, got other bytes")
    return document_bytes, body_bytes


def _exactly(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        chunk = connection.recv(min(size - len(received), 65_536))
        if not chunk:
            raise Unreadable("the connection ended early")
        received += chunk
    return bytes(received)
