"""The history: which entries of the log a filter leaves, and how much of the log one answer looks at."""

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest
from tests.publisher.api.test_api import PATH, client_of, problem_of
from tests.support.redis_probe import redis_probe

from broadcache.publisher import Publisher
from broadcache.publisher.api.settings import ApiSettings
from broadcache.publisher.history.since import since_ms_of
from broadcache.shared import Everything, InvalidSettings, Keys, Prefixes, Tags
from broadcache.shared.invalidation import Invalidation
from broadcache.shared.transport.redis.log import names_of
from broadcache.shared.wire import encode

pytestmark = pytest.mark.anyio

KEYS = ["a", "ab", "abc", "b", "ba", "ünï"]
NOW_MS = 1_750_000_000_000


def some_entry(random_: random.Random, sequence: int) -> Invalidation | None:
    """One entry of a log as publishers with strange clocks write it; None for something unreadable."""
    kind = random_.randrange(6)
    if kind == 5:
        return None
    names = tuple(random_.choices(KEYS, k=random_.randint(1, 3)))
    return Invalidation(
        epoch="E",
        seq=sequence,
        id=f"id-{sequence}",
        keys=names if kind in {0, 3} else (),
        prefixes=names[:1] if kind in {1, 3} else (),
        tags=names if kind == 2 else (),
        everything=kind == 4,
        sent_at_ms=random_.choice([None, NOW_MS + random_.randint(-1_000, 1_000)]),
    )


async def write_log(url: str, log: list[Invalidation | None], namespace: str = "default") -> None:
    async with redis_probe(url) as probe:
        await probe.call("HSET", names_of(namespace).head, "epoch", "E", "seq", len(log))
        for sequence, invalidation in enumerate(log, start=1):
            frame = b"now" if invalidation is None else encode(invalidation)
            await probe.call("XADD", names_of(namespace).log, f"{sequence}-0", "f", frame)


def is_wanted(invalidation: Invalidation | None, key: str | None, since_ms: int | None) -> bool:
    """The rule in plain Python."""
    if invalidation is None:
        return True
    concerns = (
        key is None
        or invalidation.everything
        or key in invalidation.keys
        or any(key.startswith(prefix) for prefix in invalidation.prefixes)
    )
    sent_at_ms = invalidation.sent_at_ms
    return concerns and (since_ms is None or sent_at_ms is None or sent_at_ms >= since_ms)


@pytest.mark.parametrize("seed", range(8))
async def test_filters_and_pages_leave_what_a_plain_filter_of_the_whole_log_leaves(redis_url: str, seed: int) -> None:
    random_ = random.Random(seed)
    log = [some_entry(random_, sequence) for sequence in range(1, random_.choice([0, 1, 7, 100, 101, 350]) + 1)]
    await write_log(redis_url, log)
    async with Publisher(redis_url) as publisher:
        for _ in range(25):
            key = random_.choice([None, *KEYS, "none"])
            times = [each.sent_at_ms for each in log if each is not None]
            since_ms = random_.choice([None, NOW_MS + random_.randint(-1_100, 1_100), *times[:2]])
            expected = [place for place in range(len(log), 0, -1) if is_wanted(log[place - 1], key, since_ms)]
            count, examined_max = random_.randint(1, 60), random_.choice([1, 5, 99, 100, 101, 10_000])
            found: list[int] = []
            before: int | None = None
            while True:
                page = await publisher.history_page(
                    count=count, before=before, key=key, since_ms=since_ms, examined_max=examined_max
                )
                assert len(page.entries) <= count
                assert page.examined <= examined_max
                found += [entry.sequence for entry in page.entries]
                if page.next_before is None:
                    break
                assert before is None or page.next_before < before
                before = page.next_before
            assert found == expected, (key, since_ms, count, examined_max)
            since = None if since_ms is None else datetime.fromtimestamp(since_ms / 1_000, UTC)
            some = await publisher.history(count=count, key=key, since=since)
            assert [entry.sequence for entry in some] == expected[:count]


async def test_the_last_page_says_so_even_if_it_is_full(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        for number in range(4):
            await publisher.publish(Keys(f"k{number % 2}"))
        page = await publisher.history_page(key="k0", count=2)
        assert ([entry.sequence for entry in page.entries], page.next_before, page.examined) == ([3, 1], None, 4)
        page = await publisher.history_page(key="k0", count=1)
        assert ([entry.sequence for entry in page.entries], page.next_before) == ([3], 3)


async def test_the_last_page_says_so_even_if_the_log_ends_where_a_read_of_it_does(redis_url: str) -> None:
    log = [Invalidation(epoch="E", seq=n, keys=("wanted" if n == 1 else "other",)) for n in range(1, 101)]
    await write_log(redis_url, list(log))
    async with Publisher(redis_url) as publisher:
        page = await publisher.history_page(key="wanted", count=1)
    assert ([entry.sequence for entry in page.entries], page.next_before, page.examined) == ([1], None, 100)


async def test_a_time_without_an_offset_is_refused(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        with pytest.raises(InvalidSettings, match="with an offset"):
            await publisher.history(since=datetime(2025, 6, 30))  # noqa: DTZ001


async def test_the_api_filters_by_key_and_time_and_tells_how_much_it_looked_at(redis_url: str) -> None:
    async with client_of(ApiSettings(redis_url=redis_url)) as client, Publisher(redis_url) as publisher:
        for target in (Keys("user:7"), Keys("user:8"), Prefixes("user:"), Tags("user:7"), Everything()):
            await publisher.publish(target, namespace="users")
        answer = (await client.get(PATH, params={"namespace": "users", "key": "user:7", "since": "15m"})).json()
        assert [entry["sequence"] for entry in answer["invalidations"]] == [5, 3, 1]
        assert (answer["examined"], answer["next_before"]) == (5, None)
        later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        assert "+00:00" in later
        # Not escaped, as a person types it.
        answer = (await client.get(f"{PATH}?namespace=users&since={later}")).json()
        assert (answer["invalidations"], answer["examined"]) == ([], 5)


async def test_one_answer_looks_at_ten_thousand_entries_at_most(redis_url: str) -> None:
    log: list[Invalidation | None] = [
        Invalidation(epoch="E", seq=sequence, keys=("wanted" if sequence == 1 else "other",))
        for sequence in range(1, 10_051)
    ]
    async with redis_probe(redis_url) as probe:
        commands = [
            ("XADD", names_of("default").log, f"{sequence}-0", "f", encode(invalidation))
            for sequence, invalidation in enumerate(log, start=1)
            if invalidation
        ]
        for start in range(0, len(commands), 1_000):
            await probe.call_all(commands[start : start + 1_000])
    async with client_of(ApiSettings(redis_url=redis_url, publish_timeout_seconds=20)) as client:
        first = (await client.get(PATH, params={"key": "wanted"})).json()
        assert (first["invalidations"], first["examined"], first["next_before"]) == ([], 10_000, 51)
        second = (await client.get(PATH, params={"key": "wanted", "before": 51})).json()
        assert [entry["sequence"] for entry in second["invalidations"]] == [1]
        assert (second["examined"], second["next_before"]) == (50, None)


@pytest.mark.parametrize(("query", "parameter"), [("since=yesterday", "since"), ("since=", "since"), ("key=", "key")])
async def test_a_filter_that_says_nothing_is_a_problem(redis_url: str, query: str, parameter: str) -> None:
    async with client_of(ApiSettings(redis_url=redis_url)) as client:
        problem = problem_of(await client.get(f"{PATH}?{query}"), 422, "parameter-invalid")
    assert problem["errors"][0]["parameter"] == parameter


async def test_a_publish_does_not_wait_for_a_long_search(redis_url: str) -> None:
    await write_log(redis_url, [Invalidation(epoch="E", seq=n, keys=("other",)) for n in range(1, 1_001)])
    async with Publisher(redis_url) as publisher:
        await publisher.head()
        searching = asyncio.create_task(publisher.history(key="wanted"))
        await publisher.publish(Keys("k"))
        assert not searching.done()
        assert await searching == []


@pytest.mark.parametrize(
    ("text", "ago_ms"),
    [("900", 900_000), ("1.5", 1_500), ("30s", 30_000), ("15m", 900_000), ("2h", 7_200_000), ("1d", 86_400_000)],
)
def test_how_long_ago_is_taken_from_now(text: str, ago_ms: int) -> None:
    assert since_ms_of(text, now_ms=NOW_MS) == NOW_MS - ago_ms


@pytest.mark.parametrize(
    "text", ["2025-06-15T15:06:40Z", "2025-06-15T17:06:40+02:00", "2025-06-15T17:06:40 02:00", "2025-06-15 15:06:40Z"]
)
def test_a_time_is_taken_with_its_offset(text: str) -> None:
    assert since_ms_of(text, now_ms=0) == NOW_MS


@pytest.mark.parametrize("text", ["", "yesterday", "2025-06-15T15:06:40", "2025-06-15", "15 m", "-5", "1w", "9" * 13])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InvalidSettings, match="expected a time such as"):
        since_ms_of(text, now_ms=NOW_MS)
