"""Fixtures for tests of your own code. pytest finds them by itself, where broadcache is installed."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# pytest loads this module in each of its runs: what a fixture needs is imported when a test asks for it.
if TYPE_CHECKING:
    from .recording_publisher import RecordingPublisher

__all__ = ["broadcache_url", "recording_publisher"]


@pytest.fixture(scope="session")
def broadcache_url() -> Iterator[str]:
    """The URL of a real server, started for this run on a free port of this machine, and stopped after it.

    Tests share it: give each a namespace of its own. Without a server program the test is skipped.
    """
    from ..shared.errors import ServerBinaryNotFound
    from ..shared.transport.redis.embedded import EmbeddedServer

    try:
        server = EmbeddedServer()
        server.start()
    except ServerBinaryNotFound as error:
        pytest.skip(str(error))
    with server:
        yield server.url


@pytest.fixture
def recording_publisher() -> "RecordingPublisher":
    """A publisher that needs no Redis: `recording_publisher.published` has what was published in this test."""
    from .recording_publisher import RecordingPublisher

    return RecordingPublisher()
