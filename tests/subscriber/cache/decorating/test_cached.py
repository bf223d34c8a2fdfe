"""The decorator of a cache: keys of calls, sync and async functions, methods."""

import asyncio
import copy
import functools
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cachetools import LRUCache, TTLCache
from tests.support.fake_clock import FakeClock

from broadcache.shared import InvalidLoader, InvalidName, InvalidSettings, Keys, LinkLost, Tags, key_of
from broadcache.subscriber import CachedCoroutine, CachedFunction, CacheInfo, LocalCache

pytestmark = pytest.mark.anyio


def coherent_cache(**options: Any) -> LocalCache:
    cache = LocalCache(TTLCache(100, 300), **options)
    cache.confirm_coherent(cache.clock() + 3_600)
    return cache


cache = coherent_cache()


@cache.cached("product:{product_id}")
def of_module(product_id: int) -> int:
    return product_id


class Counting:
    """A function that returns what it is called with, and how often it was called."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def __call__(self, n: object) -> int:
        self.calls.append(n)
        return len(self.calls)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_positional_keyword_and_default_arguments_give_one_key() -> None:
    counting = Counting()

    @coherent_cache().cached("product:{product_id}:{shop}")
    def product(product_id: int, shop: str = "a") -> int:
        return counting((product_id, shop))

    assert product(42) == product(42, "a") == product(42, shop="a") == product(product_id=42, shop="a") == 1
    assert product.key(42) == product.key(shop="a", product_id=42) == "product:42:a"
    assert counting.calls == [(42, "a")]
    assert product(42, shop="b") == 2


def test_an_argument_that_is_not_in_the_template_is_not_in_the_key() -> None:
    @coherent_cache().cached("product:{product_id}")
    def product(session: object, product_id: int) -> int:
        return product_id

    assert product.key(object(), 42) == "product:42"
    assert product(object(), 42) == product(object(), 42)


def test_values_that_contain_the_separator_give_two_keys() -> None:
    @coherent_cache().cached("pair:{a}:{b}")
    def pair(a: str, b: str) -> tuple[str, str]:
        return a, b

    assert pair("1:2", "3") == ("1:2", "3")
    assert pair("1", "2:3") == ("1", "2:3")


def test_one_and_its_text_are_one_key_unless_typed() -> None:
    untyped = coherent_cache().cached("n:{obj}")(repr)
    assert untyped.key(1) == untyped.key("1") == "n:1"
    typed = coherent_cache().cached("n:{obj}", typed=True)(repr)
    assert (typed(1), typed("1"), typed(True)) == ("1", "'1'", "True")


def every_kind(a: int, /, b: int, c: int = 3, *rest: int, d: int, e: int = 5, **others: int) -> tuple[Any, ...]:
    return a, b, c, rest, d, e, others


def test_each_kind_of_parameter_may_be_in_the_key() -> None:
    cached = coherent_cache().cached("{a}:{b}:{c}:{rest}:{d}:{e}:{others}")(every_kind)
    assert cached.key(1, 2, d=4) == "1:2:3:%(%):4:5:%{%}"
    assert cached.key(1, 2, 9, 8, 7, d=4, z=1, y=2) == "1:2:9:%(8%,7%,%):4:5:%{y%=2%,z%=1%,%}"
    assert cached.key(1, b=2, d=4) == cached.key(1, 2, d=4)
    assert cached(1, 2, 9, 8, d=4, z=1) == every_kind(1, 2, 9, 8, d=4, z=1)


def positional(a: int, b: int = 2, /) -> int:
    return a + b


def test_positional_parameters_keep_their_kind() -> None:
    cached = coherent_cache().cached("{a}:{b}")(positional)
    assert cached.key(1) == "1:2"
    with pytest.raises(TypeError, match=r"positional\(\) got some positional-only arguments"):
        cached.key(a=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("arguments", [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1}), ((1,), {"a": 1})])
def test_arguments_that_do_not_fit_raise_the_error_of_the_function_also_when_the_entry_exists(
    arguments: tuple[tuple[int, ...], dict[str, int]],
) -> None:
    def load(a: int, b: int = 2) -> int:
        return a + b

    cached: Any = coherent_cache().cached("{a}")(load)
    cached(1)
    args, kwargs = arguments
    with pytest.raises(TypeError) as expected:
        load(*args, **kwargs)
    with pytest.raises(TypeError) as raised:
        cached(*args, **kwargs)
    assert str(raised.value) == str(expected.value)


def test_parameters_may_have_the_names_of_what_the_key_is_made_with() -> None:
    def load(type: int, int: str, str: object = None) -> None: ...  # noqa: A002

    cached = coherent_cache().cached("{type}:{int}:{str}")(load)
    assert cached.key(1, "a") == "1:a:None"
    assert coherent_cache().cached("{len}:{ValueError}")(lambda len, ValueError: None).key(1, 2) == "1:2"  # noqa: A006, N803


def test_the_texts_of_a_template_are_taken_as_they_are() -> None:
    cached = coherent_cache().cached("'\"\\{{{n}}}\té\\N{{x}}:{n}")(lambda n: n)
    assert cached.key(1) == key_of("'\"\\{{{n}}}\té\\N{{x}}:{n}", n=1) == "'\"\\{1}\té\\N{x}:1"


def test_a_key_is_that_of_key_of_whatever_the_values() -> None:
    cached = coherent_cache().cached("p:{a}:{b}")(lambda a, b: None)
    for a in (1, -1, True, "x", "x:y", "é", "", None, 1.5, b"x", "x" * 2_000, 10**5_000, (1, "a")):
        for b in (1, "y"):
            assert cached.key(a, b) == key_of("p:{a}:{b}", a=a, b=b)


@pytest.mark.parametrize("template", ["p:{a}-{b}", "p:{a}x-y{b}", "p:{a}_{b}", "p:{a}.{b}", "p:{a},{b}", "p:{a} {b}"])
def test_a_key_is_that_of_key_of_whatever_separates_its_fields(template: str) -> None:
    cached = coherent_cache().cached(template)(lambda a, b: None)
    values = [0, 1, -1, -(10**5_000), "1", "-1", "", "a-b", "a_b", "a.b", "a,b", "a b", -1.5, True, None, (-1, "x")]
    keys = {(str(a), str(b)): cached.key(a, b) for a in values[4:] for b in values[4:]}
    assert len(set(keys.values())) == len(keys)
    for a in values:
        for b in values:
            assert cached.key(a, b) == key_of(template, a=a, b=b)


def test_an_object_without_a_stable_text_is_refused_when_called_with_the_functions_name() -> None:
    def load_product(product: object) -> object:
        return product

    cached = coherent_cache().cached("product:{product}")(load_product)
    with pytest.raises(InvalidName, match=r"load_product\(\): expected a value with a stable text for \{product\}"):
        cached(object())
    tagged = coherent_cache().cached("product", tags=["product:{product}"])(load_product)
    with pytest.raises(InvalidName, match=r"a tag of .*load_product\(\): expected a value with a stable text"):
        tagged(object())


def test_a_key_function_works_instead_of_a_template() -> None:
    @coherent_cache().cached(lambda product_id, shop="a": f"product:{product_id}:{shop}")
    def product(product_id: int, shop: str = "a") -> int:
        return product_id

    assert product(42) == product(42, shop="a") == 42
    assert product.key(42, shop="b") == "product:42:b"
    long: Any = coherent_cache().cached(lambda n: "x" * n)(lambda n: n)
    assert len(long.key(5_000)) == 1_024


def test_a_key_function_that_returns_no_text_is_refused_with_the_functions_name() -> None:
    def load(n: int) -> int:
        return n

    cached = coherent_cache().cached(lambda n: n)(load)
    with pytest.raises(InvalidName, match=r"the key function of .*load\(\): expected a string as key, got int"):
        cached(1)


def numbers() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "options", "expected"),
    [
        (lambda n: n, {"key": "{m}"}, "expected fields that are parameters of .*, got {m}"),
        (lambda n: n, {"key": "n", "tags": ("t:{m}",)}, "expected fields that are parameters of"),
        (lambda n, m: n, {"key": "{n}{m}"}, "expected a separator"),
        (lambda n: n, {"key": lambda n: n, "typed": True}, "typed=True, which is for templates"),
        (lambda n: n, {"key": None}, "expected a template"),
        (numbers, {"key": "n"}, "expected a function that returns a value, got the generator function numbers"),
        (staticmethod(numbers), {"key": "n"}, "expected a function to cache, got staticmethod"),
        (7, {"key": "n"}, "expected a function to cache, got int"),
        (dict, {"key": "n"}, "expected a function with a signature"),
    ],
)
def test_mistakes_raise_when_the_function_is_decorated(function: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidSettings, match=expected):
        coherent_cache().cached(**options)(function)


def test_a_decorator_without_a_key_says_so_when_the_function_is_called() -> None:
    decorator: Any = coherent_cache().cached
    load = decorator(lambda product_id: None)  # as @cache.cached does
    with pytest.raises(InvalidSettings, match=r"write @cache\.cached\('product:\{id\}'\), not @cache\.cached$"):
        load(1)


def test_mistakes_in_the_options_raise_at_once() -> None:
    with pytest.raises(InvalidName, match=r"write \('x',\)"):
        coherent_cache().cached("n", tags="x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidSettings, match="ttl_seconds"):
        coherent_cache().cached("n", ttl_seconds="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ttl"):
        coherent_cache().cached("n", ttl=3)  # type: ignore[call-arg]


# --- functions -------------------------------------------------------------------------------------------------------


async def test_a_coroutine_function_is_called_once_for_concurrent_callers() -> None:
    calls = 0

    @cache.cached("async:{n}")
    async def load(n: int) -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        return n

    assert await asyncio.gather(*(load(1) for _ in range(20))) == [1] * 20
    assert await load(1) == 1
    assert calls == 1


def test_a_function_is_called_once_for_concurrent_threads() -> None:
    counting, released = Counting(), threading.Event()

    @coherent_cache().cached("n:{n}")
    def load(n: int) -> int:
        released.wait(20)
        return counting(n)

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(load, 1) for _ in range(8)]
        released.set()
        assert [each.result(20) for each in waiting] == [1] * 8


def test_tags_and_lifetimes_are_those_of_the_decorator() -> None:
    clock = FakeClock()
    cache = LocalCache(TTLCache(100, 300, timer=clock), clock=clock, max_staleness_seconds=1_000)
    cache.confirm_coherent(clock())
    counting = Counting()

    @cache.cached("product:{product_id}", tags=("shop:{shop}", "all"), ttl_seconds=60)
    def product(product_id: int, shop: str = "a:b") -> int:
        return counting(product_id)

    assert product(1) == product(1) == 1
    cache.apply(Tags("shop:a%3Ab"))
    assert product(1) == 2
    cache.apply(Tags("all"))
    assert product(1) == 3
    clock.now += 61
    assert product(1) == 4


def test_an_exception_is_raised_and_not_cached() -> None:
    counting = Counting()

    @coherent_cache().cached("n:{n}")
    def load(n: int) -> int:
        if counting(n) == 1:
            raise LookupError(n)
        return n

    with pytest.raises(LookupError):
        load(1)
    assert load(1) == 1


def test_functions_that_share_a_template_share_entries() -> None:
    cache = coherent_cache()
    first = cache.cached("n:{n}")(lambda n: "first")
    second = cache.cached("n:{n}")(lambda n: "second")
    assert first(1) == second(1) == "first"


def test_a_hit_and_a_miss_count_once() -> None:
    cache = coherent_cache()
    load = cache.cached("n:{n}")(lambda n: n)
    assert [load(1), load(1), load(2)] == [1, 1, 2]
    assert load.cache_info() == CacheInfo(hits=1, misses=2, maxsize=100, currsize=2)
    load.cache_clear()
    assert load.cache_info().currsize == 0
    assert load(1) == 1
    assert load.cache_info().misses == 3


def test_a_bypassed_read_calls_the_function_and_counts_as_a_miss() -> None:
    counting = Counting()
    load = LocalCache(LRUCache(10)).cached("n:{n}")(counting)
    assert (load(1), load(1)) == (1, 2)
    assert load.cache_info() == CacheInfo(hits=0, misses=2, maxsize=10, currsize=1)


def test_a_cached_function_looks_like_the_function() -> None:
    assert of_module.__name__ == "of_module"
    assert of_module.__wrapped__(3) == 3
    assert isinstance(of_module, CachedFunction)
    assert str(inspect.signature(of_module)) == "(product_id: int) -> int"
    assert repr(of_module).startswith("<cached <function of_module at ")
    assert not inspect.iscoroutinefunction(of_module)
    assert copy.deepcopy(of_module) is of_module
    assert pickle.loads(pickle.dumps(of_module)) is of_module


async def test_frameworks_see_a_coroutine_function() -> None:
    @cache.cached("n:{n}")
    async def load(n: int) -> int:
        return n

    class Shop:
        @cache.cached("shop:{n}")
        async def load(self, n: int) -> int:
            return n

    from starlette._utils import is_async_callable

    for function in (load, Shop().load):
        assert is_async_callable(function)
        assert inspect.isawaitable(waiting := function(1))
        assert await waiting == 1
    assert isinstance(load, CachedCoroutine)


def test_a_partial_and_a_lambda_can_be_cached() -> None:
    add = coherent_cache().cached("{a}:{b}")(functools.partial(lambda a, b: a + b, b=2))
    assert add(1) == 3
    assert add.key(1) == "1:2"


def test_a_function_that_returns_a_coroutine_without_being_a_coroutine_function_is_refused_when_called() -> None:
    async def fetch(n: int) -> int:
        return n

    def load_wrongly(n: int) -> object:
        return fetch(n)

    load = coherent_cache().cached("{n}")(load_wrongly)
    with pytest.raises(InvalidLoader, match="expected a loader that returns a value"):
        load(1)


# --- methods ---------------------------------------------------------------------------------------------------------

of_methods = coherent_cache()


class Shop:
    def __init__(self, name: str) -> None:
        self.name = name

    @of_methods.cached("product:{product_id}")
    def product(self, product_id: int) -> str:
        return f"{self.name}:{product_id}"

    @of_methods.cached(lambda product_id: f"price:{product_id}", tags=("shop:{self.name}",))
    async def price(self, product_id: int) -> str:
        return f"{self.name}:{product_id}"

    @of_methods.cached("of:{self.name}:{n}")
    def own(self, n: int) -> str:
        return f"{self.name}:{n}"

    @staticmethod
    @of_methods.cached("static:{n}")
    def static(n: int) -> int:
        return n


async def test_self_is_not_part_of_the_key() -> None:
    shop, other = Shop("a"), Shop("b")
    assert shop.product(1) == other.product(1) == Shop.product(shop, 1) == "a:1"
    assert shop.product.key(1) == Shop.product.key(shop, 1) == "product:1"
    assert await shop.price(1) == await other.price(1) == await Shop.price(shop, 1) == "a:1"
    assert shop.price.key(1) == "price:1"
    assert (shop.own(1), other.own(1)) == ("a:1", "b:1")
    static: Any = shop.static  # type: ignore[misc, unused-ignore]  # pyright: ignore
    assert Shop.static(3) == static(3) == 3
    of_methods.apply(Tags("shop:a"))
    assert await other.price(1) == "b:1"


def test_a_cached_method_is_bound_as_a_method_is() -> None:
    shop = Shop("a")
    assert shop.product == shop.product != Shop("a").product
    assert hash(shop.product) == hash(shop.product)
    assert shop.product.__wrapped__(9) == "a:9"
    assert shop.product.cache_info().maxsize == 100
    copied = copy.copy(shop)
    copied.name = "c"
    assert copied.own(1) == "c:1"
    assert pickle.loads(pickle.dumps(shop)).own.key(1) == "of:a:1"


def test_a_partial_may_be_a_method_and_a_parameter_may_be_named_self() -> None:
    class Partials:
        add = of_methods.cached("add:{b}")(functools.partial(lambda self, a, b: a + b, a=1))

        @of_methods.cached("named:{self}")
        def named(this, *, self: int) -> int:  # noqa: N805
            return self

    partials = Partials()
    assert partials.add(b=2) == partials.add.__wrapped__(b=2) == 3
    assert "functools.partial" in repr(partials.add)
    assert partials.named(self=7) == Partials.named(partials, self=7) == 7
    assert partials.named.key(self=7) == "named:7"
    assert weakref.ref(method := partials.named)() is method


# --- invalidation without a subscriber -------------------------------------------------------------------------------


async def test_an_invalidation_without_a_subscriber_drops_here_and_says_that_it_was_not_published() -> None:
    cache, counting = coherent_cache(), Counting()
    load = cache.cached("n:{n}")(counting)

    @cache.cached("async:{n}")
    async def load_async(n: int) -> int:
        return counting(n)

    assert (load(1), await load_async(1)) == (1, 2)
    with pytest.raises(LinkLost, match="no subscriber follows the cache"):
        load.invalidate(1)
    with pytest.raises(LinkLost, match="no subscriber follows the cache"):
        await load_async.invalidate(1)
    assert (load(1), await load_async(1)) == (3, 4)


def test_only_the_key_of_the_call_is_invalidated() -> None:
    cache, counting = coherent_cache(), Counting()
    load: Callable[..., int] = cache.cached("n:{n}")(counting)
    assert (load(1), load(11)) == (1, 2)
    cache.apply(Keys(key_of("n:{n}", n=1)))
    assert (load(1), load(11)) == (3, 2)
