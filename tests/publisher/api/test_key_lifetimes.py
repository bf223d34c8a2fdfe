"""How long idempotency keys are remembered: no caller can fill Redis with receipts."""

import pytest
from tests.publisher.api.test_api import PATH, client_of
from tests.support.fake_clock import FakeClock
from tests.support.redis_probe import redis_probe

from broadcache.publisher.api import idempotency
from broadcache.publisher.api.idempotency import KeyLifetimes
from broadcache.publisher.api.settings import ApiSettings

pytestmark = pytest.mark.anyio


def test_a_caller_has_so_many_keys_at_once_and_as_many_again_in_each_lifetime(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    lifetimes = KeyLifetimes(100.0, keys_max=10, clock=clock)
    assert [lifetimes.seconds_for("a") for _ in range(15)] == [100.0] * 10 + [None] * 5
    assert caplog.text.count("more than 10 Idempotency-Keys within 100 s") == 1
    assert lifetimes.seconds_for("b") == 100.0, "another caller has keys of its own"
    clock.now += 10.0
    assert [lifetimes.seconds_for("a") for _ in range(2)] == [100.0, None]
    clock.now += 1_000_000.0
    assert [lifetimes.seconds_for("a") for _ in range(11)] == [100.0] * 10 + [None]
    assert len(caplog.records) == 2, "once for each time that a caller has used up its keys"


async def test_the_memory_of_receipts_is_bounded_by_their_lifetime(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency.KeyLifetimes.__init__, "__kwdefaults__", {"keys_max": 3, "clock": FakeClock()})
    async with client_of(ApiSettings(redis_url=redis_url)) as client, redis_probe(redis_url) as probe:
        for number in range(8):
            headers = {"Idempotency-Key": str(number)}
            for is_replayed in (False, True):
                answer = await client.post(PATH, json={"keys": ["k"]}, headers=headers)
                assert answer.status_code == 200
                # A key beyond the limit is still good for a retry.
                assert ("idempotency-replayed" in answer.headers) == is_replayed
        receipts = list(await probe.call("KEYS", "*:receipt:*"))
        lifetimes = [int(await probe.call("PTTL", key)) for key in receipts]
        sizes = [int(await probe.call("MEMORY", "USAGE", key)) for key in receipts]
    assert len(receipts) == 8
    assert sum(lifetime > 60_000 for lifetime in lifetimes) <= 3
    assert max(sizes) <= 256, "docs/redis.md: about 200 bytes each"
