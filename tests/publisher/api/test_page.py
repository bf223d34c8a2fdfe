"""The operators' page, as an operator has it: in a real browser, before a real publisher and real replicas."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from email.message import Message
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request, expect, sync_playwright
from tests.support.browser import ARGUMENTS, CHROMIUM, called_fleet, fleet, replica, serving
from tests.support.child_replica import KEY
from tests.support.command_line import ask

from broadcache.publisher.api.app import create_fanout_app
from broadcache.publisher.api.page.page import PAGE_PATHS
from broadcache.publisher.api.settings import FanoutSettings
from broadcache.shared.transport.redis.embedded import EmbeddedServer

PATIENCE_MS = 20_000
LISTED_LONG = {"echo_timeout_seconds": 30.0}
"""A replica that is listed for long after its last echo."""
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
HOSTILE_NAME = "<img/src=x/onerror=document.title='owned'>"
READ_ONLY, READ_WRITE = "reader-0123456789", "writer-0123456789"

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("expected Chromium to drive, found none: apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as running:
        yield running


@pytest.fixture(scope="module")
def url(server: EmbeddedServer) -> Iterator[str]:
    with serving(server.url) as url:
        yield url


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    """One that no other test uses."""
    return re.sub(r"[^a-z0-9]+", "-", request.node.name)[:60].strip("-")


Open = Callable[..., Page]
Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a publisher with settings of its own, which outlives the pages of the test."""
    with ExitStack() as stack:
        yield lambda server, **settings: stack.enter_context(serving(server.url, **settings))


@pytest.fixture
def open_page(browser: Browser, serve: Serve) -> Iterator[Open]:
    """Opens a page; whatever its console complains of by the end fails the test."""
    complaints: list[str] = []
    with ExitStack() as stack:

        def opened(address: str, *, complains: str = r"(?!)", **options: Any) -> Page:
            context = stack.enter_context(_context(browser, **options))
            page = context.new_page()

            def note(text: str) -> None:
                if not re.search(complains, text):
                    complaints.append(text)

            page.on("console", lambda message: note(f"{message.type}: {message.text} {message.location}"))
            page.on("pageerror", lambda error: note(f"error: {error}"))
            page.on("requestfailed", lambda request: note(f"failed: {request.url}") if is_broken(request) else None)
            page.goto(address)
            return page

        def is_broken(request: Request) -> bool:
            """A page that is left, or closed, gives up what it still asks for: that is aborted, not broken."""
            is_ours = request.url.endswith((".js", ".css", ".svg", "/"))
            return is_ours and request.failure != "net::ERR_ABORTED"

        yield opened
    assert complaints == []


@contextmanager
def _context(browser: Browser, **options: Any) -> Iterator[BrowserContext]:
    context = browser.new_context(**options)
    try:
        yield context
    finally:
        context.close()


def card(page: Page, name: str) -> Locator:
    return page.locator(f'.replica[data-replica="{name}"]')


def tick(page: Page, name: str) -> Locator:
    return page.locator(f'.tick[data-replica="{name}"]')


def publish(url: str, namespace: str, *keys: str, **fields: object) -> None:
    status, _ = ask("POST", f"{url}/invalidations", {"namespace": namespace, "keys": keys, **fields})
    assert status == 200


# Who is there


def test_replicas_appear_and_vanish(open_page: Open, url: str, server: EmbeddedServer, namespace: str) -> None:
    page = open_page(f"{url}/?namespace={namespace}")
    expect(page.locator("#replicas")).to_contain_text("No replica is registered")
    with fleet(server.url, namespace, ["web-1", "web-2"]):
        expect(page.locator(".replica h3")).to_have_text(["web-1", "web-2"])
        expect(card(page, "web-1")).to_contain_text("✓ coherent")
        expect(card(page, "web-1")).to_contain_text(re.compile(r"\d\.\d s of 5\.0 s"))
        expect(page.locator("#replicas-summary")).to_contain_text("2 replicas, all coherent")
        expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#replicas")).to_contain_text("No replica is registered")
    expect(page.locator("#replicas-news")).to_contain_text("left")
    expect(page.locator("#banner")).to_be_hidden()


def test_a_replica_that_stands_still_turns_red_and_is_named_until_it_has_caught_up(
    open_page: Open, url: str, server: EmbeddedServer, namespace: str
) -> None:
    with (
        replica(server.url, namespace, "web-1"),
        replica(server.url, namespace, "web-2", max_staleness_seconds=1.0, **LISTED_LONG) as frozen,
    ):
        page = open_page(f"{url}/?namespace={namespace}")
        expect(page.locator(".replica[data-level=good]")).to_have_count(2)
        frozen.freeze()
        expect(card(page, "web-2")).to_have_attribute("data-level", "bad")
        expect(card(page, "web-2")).to_contain_text("✗ overdue")
        expect(page.locator("#banner")).to_contain_text("1 of 2 replicas not proven up to date: web-2")
        expect(card(page, "web-1")).to_have_attribute("data-level", "good")
        page.fill("#names", KEY)
        page.click("#send")
        expect(tick(page, "web-1")).to_have_attribute("data-outcome", "confirmed")
        expect(tick(page, "web-2")).to_have_attribute("data-outcome", "missing")
        expect(page.locator("#outcome-verdict")).to_contain_text("confirmed by 1 of 2 replicas")
        frozen.wake()
        expect(tick(page, "web-2")).to_have_attribute("data-outcome", "confirmed")
        expect(tick(page, "web-2")).to_contain_text("later, by its echo")
        expect(page.locator("#outcome-verdict")).to_contain_text("confirmed by 2 of 2 replicas")
        expect(card(page, "web-2")).to_have_attribute("data-level", "good")
        expect(page.locator("#banner")).to_be_hidden()


def test_a_replica_that_was_killed_is_named_also_on_a_fresh_page_until_it_is_forgotten(
    open_page: Open, url: str, server: EmbeddedServer, namespace: str
) -> None:
    with replica(server.url, namespace, "web-1") as killed:
        page = open_page(f"{url}/?namespace={namespace}")
        expect(card(page, "web-1")).to_have_attribute("data-level", "good")
        killed.kill()
        expect(card(page, "web-1")).to_contain_text("✗ gone silent")
        expect(page.locator("#banner")).to_contain_text("killed, frozen or cut off")
    page = open_page(f"{url}/?namespace={namespace}")
    expect(card(page, "web-1")).to_contain_text("✗ gone silent")
    expect(card(page, "web-1")).to_contain_text("serves nothing from its cache")
    expect(card(page, "web-1")).to_contain_text(re.compile(r"last seen \d\d:\d\d:\d\d"))
    expect(page.locator("#banner")).to_contain_text("web-1 last seen")
    card(page, "web-1").get_by_role("button", name="Forget").click()
    expect(card(page, "web-1")).to_have_count(0)
    expect(page.locator("#banner")).to_be_hidden()
    with replica(server.url, namespace, "web-1"):
        expect(card(page, "web-1")).to_have_attribute("data-level", "good")
        expect(page.locator("#banner")).to_be_hidden()


def test_fifty_replicas_have_a_card_each_which_is_changed_in_place(
    open_page: Open, url: str, server: EmbeddedServer, namespace: str
) -> None:
    names = [f"web-{number:02}" for number in range(50)]
    with fleet(server.url, namespace, names):
        page = open_page(f"{url}/?namespace={namespace}")
        expect(page.locator(".replica h3")).to_have_text(names)
        expect(page.locator("#replicas-summary")).to_contain_text("50 replicas, all coherent")
        page.evaluate("""() => {
            window.changes = {nodes: 0, texts: 0};
            new MutationObserver((records) => {
                for (const record of records) {
                    if (record.target.id === "replicas") changes.nodes += 1; else changes.texts += 1;
                }
            }).observe(document.getElementById("replicas"), {childList: true, subtree: true});
        }""")
        while page.evaluate("changes.texts") < 100:
            pass
        assert page.evaluate("changes.nodes") == 0


def test_a_publisher_without_redis_says_so_and_goes_on_when_it_is_back(
    open_page: Open, serve: Serve, own_server: EmbeddedServer, namespace: str
) -> None:
    url = serve(own_server, publish_timeout_seconds=0.5)
    publish(url, namespace, "before")
    page = open_page(f"{url}/?namespace={namespace}", complains="503")
    expect(page.locator("#stream")).to_contain_text("before")
    own_server.pause()
    expect(page.locator("#banner")).to_contain_text("Redis is unreachable")
    expect(page.locator("#link-text")).to_contain_text("no events arrive")
    own_server.resume()
    expect(page.locator("#banner")).to_be_hidden()
    publish(url, namespace, "after")
    expect(page.locator(".invalidation")).to_have_count(2)
    expect(page.locator("#link-text")).to_contain_text("live")


# What was invalidated


def test_what_anybody_invalidates_is_shown_the_newest_first(open_page: Open, url: str, namespace: str) -> None:
    publish(url, namespace, "old", reason="price change")
    page = open_page(f"{url}/?namespace={namespace}")
    expect(page.locator(".invalidation")).to_have_count(1)
    publish(url, namespace, "new", tags=["catalogue"], prefixes=["user:7:"])
    expect(page.locator(".invalidation")).to_have_count(2)
    expect(page.locator(".invalidation").nth(0).locator(".target")).to_have_text(
        ["keynew", "tagcatalogue", "prefixuser:7:…"]
    )
    expect(page.locator(".invalidation").nth(1)).to_contain_text("price change")


def test_while_paused_the_list_stands_still_and_nothing_is_lost(open_page: Open, url: str, namespace: str) -> None:
    publish(url, namespace, "first")
    page = open_page(f"{url}/?namespace={namespace}")
    expect(page.locator(".invalidation")).to_have_count(1)
    page.click("#pause")
    for key in ("second", "third"):
        publish(url, namespace, key)
    expect(page.locator("#stream-summary")).to_contain_text("2 more since you paused")
    expect(page.locator(".invalidation")).to_have_count(1)
    page.click("#pause")
    expect(page.locator(".invalidation .target")).to_have_text(["keythird", "keysecond", "keyfirst"])


def test_where_no_stream_is_to_be_had_the_log_is_asked_and_shows_each_entry_once(
    open_page: Open, url: str, namespace: str
) -> None:
    publish(url, namespace, "first")
    page = open_page(url, complains="404")
    # Some proxies let no stream through.
    page.route(re.compile(r"/events\?"), lambda route: route.fulfill(status=404))
    page.goto(f"{url}/?namespace={namespace}")
    expect(page.locator("#link-text")).to_have_text("live, every 2 s")
    publish(url, namespace, "second")
    expect(page.locator(".invalidation .target")).to_have_text(["keysecond", "keyfirst"])
    publish(url, namespace, "third")
    expect(page.locator(".invalidation .target")).to_have_text(["keythird", "keysecond", "keyfirst"])


# Invalidating


def test_an_invalidation_is_previewed_sent_and_ticked_off_by_each_replica(
    open_page: Open, url: str, server: EmbeddedServer, namespace: str
) -> None:
    with replica(server.url, namespace, "web-1"), replica(server.url, namespace, "web-2"):
        page = open_page(f"{url}/?namespace={namespace}")
        expect(page.locator(".replica[data-level=good]")).to_have_count(2)
        page.fill("#names", f"{KEY}\n\n other \n{KEY}")
        page.fill("#reason", "wrong price")
        expect(page.locator("#preview")).to_have_text("2 replicas, 2 entries")
        page.click("#send")
        for name in ("web-1", "web-2"):
            expect(tick(page, name)).to_have_attribute("data-outcome", "confirmed")
            expect(tick(page, name)).to_contain_text(re.compile(r"✓.* ms"))
        expect(page.locator("#outcome-verdict")).to_have_text("#1 confirmed by 2 of 2 replicas")
        expect(page.locator("#outcome-doubt")).to_be_hidden()
        expect(page.locator(".invalidation")).to_contain_text("wrong price")
        expect(page.locator(".invalidation .target")).to_have_text([f"key{KEY}", "keyother"])


def test_a_preview_says_about_how_much_is_meant_while_one_types_and_drops_nothing(
    open_page: Open, url: str, server: EmbeddedServer, namespace: str
) -> None:
    with fleet(server.url, namespace, ["web-1", "web-2", "web-3"], entries=2_000):
        page = open_page(f"{url}/?namespace={namespace}")
        expect(page.locator(".replica[data-level=good]")).to_have_count(3)
        preview = page.locator("#preview")
        page.fill("#names", "product:7\nproduct:8\nproduct:9\nproduct:10\nnobody has it")
        expect(preview).to_have_text("3 replicas, 12 entries")
        page.select_option("#kind", "prefixes")
        page.fill("#names", "product:")
        expect(preview).to_have_text("3 replicas, about 6,000 entries")
        page.select_option("#kind", "everything")
        expect(preview).to_have_text("3 replicas, 6,000 entries")
        page.select_option("#kind", "tags")
        page.fill("#names", "")
        expect(preview).to_have_text("")
        expect(page.locator("#replicas-summary")).to_contain_text("6,000 entries")
        assert ask("GET", f"{url}/invalidations?namespace={namespace}")[1]["invalidations"] == []
        page.fill("#names", "any")
        page.select_option("#kind", "everything")
        page.click("#send")
        expect(page.locator("#outcome-verdict")).to_have_text("#1 confirmed by 3 of 3 replicas")
        expect(preview).to_have_text("3 replicas, 0 entries")


def test_a_preview_names_whoever_did_not_answer(
    open_page: Open, url: str, server: EmbeddedServer, namespace: str
) -> None:
    with (
        replica(server.url, namespace, "web-1"),
        replica(server.url, namespace, "web-2", **LISTED_LONG) as frozen,
    ):
        page = open_page(f"{url}/?namespace={namespace}")
        expect(page.locator(".replica[data-level=good]")).to_have_count(2)
        frozen.freeze()
        page.fill("#names", KEY)
        expect(page.locator("#preview")).to_have_text("2 replicas, about 1 entry; no answer from web-2")


def test_what_redis_did_not_take_is_ticked_off_by_whoever_was_told_by_http(
    open_page: Open, serve: Serve, own_server: EmbeddedServer
) -> None:
    with called_fleet(own_server.url) as second_path:
        url = serve(own_server, publish_timeout_seconds=1.0, **second_path)
        page = open_page(f"{url}/?namespace=products", complains="503")
        expect(page.locator(".replica[data-level=good]")).to_have_count(3)
        own_server.pause()
        try:
            page.fill("#names", "product:42")
            page.click("#send")
            for name in ("web-0", "web-1", "web-2"):
                expect(tick(page, name)).to_have_attribute("data-outcome", "confirmed")
                expect(tick(page, name)).to_contain_text("by its answer over HTTP")
            expect(page.locator("#outcome-verdict")).to_have_text(
                "Sent by HTTP, waiting to be logged; confirmed by 3 of 3 replicas"
            )
        finally:
            own_server.resume()
        expect(page.locator(".invalidation .target")).to_have_text(["keyproduct:42"])


@pytest.mark.parametrize(
    ("kind", "expected"), [("tags", "tagname"), ("prefixes", "prefixname…"), ("everything", "everything")]
)
def test_tags_prefixes_and_everything_can_be_invalidated(
    open_page: Open, url: str, namespace: str, kind: str, expected: str
) -> None:
    page = open_page(f"{url}/?namespace={namespace}")
    page.select_option("#kind", kind)
    if kind == "everything":
        expect(page.locator("#names")).to_be_hidden()
        expect(page.locator("#send")).to_have_text(f"Invalidate all of {namespace}")
    else:
        page.fill("#names", "name")
    page.click("#send")
    expect(page.locator("#outcome-verdict")).to_have_text("#1 is in the log; no replica is registered")
    expect(page.locator("#outcome-doubt")).to_contain_text(
        f"There may be other replicas: the registry of '{namespace}'"
    )
    expect(page.locator(".invalidation .target")).to_have_text([expected])


def test_naming_nothing_sends_nothing_and_says_what_to_do(open_page: Open, url: str, namespace: str) -> None:
    page = open_page(f"{url}/?namespace={namespace}")
    page.click("#send")
    expect(page.locator("#outcome-verdict")).to_contain_text("Name at least one")
    expect(page.locator("#names")).to_be_focused()
    assert ask("GET", f"{url}/invalidations?namespace={namespace}")[1]["invalidations"] == []


def test_an_invalidation_whose_answer_was_lost_is_published_once_when_it_is_sent_again(
    open_page: Open, url: str, namespace: str
) -> None:
    page = open_page(f"{url}/?namespace={namespace}", complains="net::ERR_FAILED")
    expect(page.locator("#link-text")).to_contain_text("live")

    def lose_the_answer(route: Any) -> None:
        route.fetch()
        route.abort()

    page.route("**/invalidations", lose_the_answer, times=1)
    page.fill("#names", "lost")
    page.click("#send")
    expect(page.locator("#outcome-verdict")).to_contain_text("Send it again: it is published once")
    page.click("#send")
    expect(page.locator("#outcome-verdict")).to_contain_text("#1 is in the log")
    assert len(ask("GET", f"{url}/invalidations?namespace={namespace}")[1]["invalidations"]) == 1


def test_a_keyboard_is_enough_from_the_top_to_a_sent_invalidation(
    open_page: Open, url: str, server: EmbeddedServer, namespace: str
) -> None:
    with fleet(server.url, namespace, ["web-1"]):
        page = open_page(f"{url}/?namespace={namespace}")
        expect(card(page, "web-1")).to_be_visible()
        page.keyboard.press("Tab")
        expect(page.locator(".skip")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_be_focused()
        tab_to(page, "names")
        page.keyboard.type("key")
        tab_to(page, "send")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        expect(tick(page, "web-1")).to_have_attribute("data-outcome", "confirmed")
        expect(page.locator("#send")).to_be_focused()


def tab_to(page: Page, id: str) -> None:
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == id:
            return
    raise AssertionError(f"expected to reach #{id} in ten steps")


# Who may


def test_without_a_token_the_page_loads_and_asks_for_one_and_shows_nothing_else(
    open_page: Open, serve: Serve, server: EmbeddedServer, namespace: str
) -> None:
    url = serve(server, tokens=(f"ro:{READ_ONLY}", f"rw:{READ_WRITE}"), namespaces=(namespace,))
    page = open_page(url)
    expect(page.get_by_role("heading", name="A token is needed")).to_be_visible()
    expect(page.locator("#content")).to_be_hidden()
    page.fill("#token", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#token-wrong")).to_contain_text("not valid")
    assert namespace not in page.content()
    page.fill("#token", READ_WRITE)
    page.keyboard.press("Enter")
    expect(page.locator("#content")).to_be_visible()
    page.fill("#names", "key")
    page.click("#send")
    expect(page.locator("#outcome-verdict")).to_contain_text("#1 is in the log")
    kept = page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]")
    assert kept == [json.dumps({"broadcache-token": READ_WRITE}, separators=(",", ":")), "{}", ""]
    assert READ_WRITE not in page.url + page.content()
    page.reload()
    expect(page.locator("#content")).to_be_visible()
    page.click("#token-forget")
    expect(page.get_by_role("heading", name="A token is needed")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_token_that_may_only_read_shows_everything_and_cannot_invalidate(
    open_page: Open, serve: Serve, server: EmbeddedServer, namespace: str
) -> None:
    url = serve(server, tokens=(f"ro:{READ_ONLY}", f"rw:{READ_WRITE}"))
    with fleet(server.url, namespace, ["web-1"]):
        page = open_page(f"{url}/?namespace={namespace}")
        page.fill("#token", READ_ONLY)
        page.keyboard.press("Enter")
        expect(card(page, "web-1")).to_have_attribute("data-level", "good")
        expect(page.locator("#form-read-only")).to_contain_text("Read-only")
        for field in ("#names", "#reason", "#kind", "#send"):
            expect(page.locator(field)).to_be_disabled()


def test_where_namespaces_are_limited_one_is_chosen_from_them(
    open_page: Open, serve: Serve, server: EmbeddedServer
) -> None:
    url = serve(server, namespaces=("limited-products", "limited-users"))
    publish(url, "limited-users", "user:7")
    page = open_page(url)
    expect(page.get_by_label("Namespace")).to_have_value("limited-products")
    page.select_option("#namespace-select", "limited-users")
    expect(page.locator(".invalidation .target")).to_have_text(["keyuser:7"])
    assert page.url.endswith("?namespace=limited-users")


def test_any_namespace_can_be_typed_where_they_are_not_limited(open_page: Open, url: str, namespace: str) -> None:
    publish(url, namespace, "typed")
    page = open_page(url)
    expect(page.get_by_label("Namespace")).to_have_value("default")
    page.get_by_label("Namespace").fill(namespace)
    page.keyboard.press("Enter")
    expect(page.locator(".invalidation .target")).to_have_text(["keytyped"])


# What it is made of


def test_names_that_others_chose_stay_text(open_page: Open, url: str, server: EmbeddedServer, namespace: str) -> None:
    with fleet(server.url, namespace, [HOSTILE_NAME]):
        publish(url, namespace, HOSTILE, tags=[HOSTILE], prefixes=[HOSTILE], reason=HOSTILE)
        page = open_page(f"{url}/?namespace={namespace}")
        expect(page.locator(".replica h3")).to_have_text(HOSTILE_NAME)
        expect(page.locator(".target").nth(0)).to_have_text(f"key{HOSTILE}")
        expect(page.locator(".why q")).to_have_text(HOSTILE)
        page.fill("#names", HOSTILE)
        page.click("#send")
        expect(page.locator("#outcome-title")).to_have_text(f"Key {HOSTILE}")
        expect(tick(page, HOSTILE_NAME)).to_have_attribute("data-outcome", "confirmed")
        assert page.locator("main img, main script").count() == 0
        assert page.title() == f"{namespace} · broadcache"


def test_a_script_that_found_its_way_in_would_not_run(open_page: Open, url: str) -> None:
    page = open_page(url, complains="Content Security Policy|requires 'Trusted(HTML|Script)'")
    outcome = page.evaluate("""() => {
        const script = document.createElement("script");
        try { script.textContent = "document.title = 'owned'"; } catch { return "refused"; }
        document.body.append(script);
        return document.title;
    }""")
    assert outcome != "owned"
    assert page.evaluate("() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } }") == (
        "TypeError"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_axe_finds_nothing_serious_and_nothing_sticks_out(
    open_page: Open, url: str, server: EmbeddedServer, namespace: str, scheme: str, width: int
) -> None:
    long = "a-name-that-is-long-" * 5
    with replica(server.url, namespace, "web-1", max_staleness_seconds=1.0, **LISTED_LONG) as frozen:
        publish(url, namespace, long * 3, *[f"product:{number}" for number in range(20)], reason=long * 2)
        # axe builds elements from text itself; what the policy keeps out is another test's matter.
        page = open_page(
            f"{url}/?namespace={namespace}",
            color_scheme=scheme,
            viewport={"width": width, "height": 800},
            reduced_motion="reduce",
            bypass_csp=True,
        )
        expect(card(page, "web-1")).to_have_attribute("data-level", "good")
        page.fill("#names", long)
        expect(page.locator("#preview")).to_contain_text("1 replica")
        assert serious(page) == []
        frozen.freeze()
        expect(page.locator("#banner")).to_be_visible()
        page.click("#send")
        expect(tick(page, "web-1")).to_have_attribute("data-outcome", "missing")
        assert serious(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_where_a_token_is_asked_for_or_may_only_read(
    open_page: Open, serve: Serve, server: EmbeddedServer, scheme: str
) -> None:
    url = serve(server, tokens=(f"ro:{READ_ONLY}",))
    page = open_page(url, color_scheme=scheme, bypass_csp=True)
    expect(page.locator("#token-section")).to_be_visible()
    assert serious(page) == []
    page.fill("#token", READ_ONLY)
    page.keyboard.press("Enter")
    expect(page.locator("#form-read-only")).to_be_visible()
    assert serious(page) == []


def serious(page: Page) -> list[str]:
    violations = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['html']}"
        for violation in violations
        if violation["impact"] in {"serious", "critical"}
        for node in violation["nodes"]
    ]


# How it is served


def test_the_page_and_its_files_need_no_token_and_say_how_they_may_be_used(
    serve: Serve, server: EmbeddedServer
) -> None:
    url = serve(server, tokens=(f"rw:{READ_WRITE}",))
    for path in sorted(PAGE_PATHS):
        status, headers, body = fetch(url + path)
        assert status == 200, path
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
        assert READ_WRITE.encode() not in body
        assert re.findall(rb"https?://(?!www\.w3\.org)", body) == []
    assert fetch(f"{url}/replicas")[0] == fetch(f"{url}/page.html")[0] == 401
    assert fetch(f"{url}/page.json")[2] == b'{"right":null,"namespaces":[],"default_namespace":"default"}'


def test_a_file_that_the_browser_has_already_is_not_sent_again(url: str) -> None:
    _, headers, body = fetch(f"{url}/page.js")
    assert headers["Cache-Control"] == "no-cache"
    assert headers.get_content_type() == "text/javascript"
    assert body
    assert fetch(f"{url}/page.js", **{"If-None-Match": headers["ETag"]})[::2] == (304, b"")
    assert fetch(f"{url}/page.js", **{"If-None-Match": '"other"'})[0] == 200


def test_the_page_takes_no_name_from_the_services_of_the_fan_out() -> None:
    assert [path for path in PAGE_PATHS if path.count("/") != 1] == []
    routes = {getattr(route, "path", "") for route in create_fanout_app(FanoutSettings()).routes}
    assert routes & PAGE_PATHS == set()


def fetch(address: str, **headers: str) -> tuple[int, Message, bytes]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(address, headers=headers), timeout=30) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()
