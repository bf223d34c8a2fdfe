"""What a fan-out needs besides the base install is named when it is built, not when it is first used."""

import pytest

from broadcache.publisher.api.settings import ApiSettings
from broadcache.publisher.fanout.broadcaster import Broadcaster
from broadcache.publisher.fanout.discovery import DnsDiscovery, ListDiscovery
from broadcache.publisher.fanout.fanout import Fanout
from broadcache.publisher.fanout.policy import FanoutPolicy
from broadcache.shared import InvalidSettings

LISTS = {"web": ["127.0.0.1:80"]}


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "broadcache.shared.process.extras.find_spec", lambda name: None if name == package else object()
    )


def test_a_broadcaster_without_h11_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without("h11", monkeypatch)
    with pytest.raises(InvalidSettings, match=r"the fan-out needs the package h11.*'broadcache\[fanout\]'"):
        Broadcaster(ListDiscovery(LISTS), FanoutPolicy(["web:80"]))


def test_a_broadcaster_that_may_call_nothing_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without("h11", monkeypatch)
    assert Broadcaster(ListDiscovery(LISTS), FanoutPolicy([])).limits.concurrency > 0


@pytest.mark.parametrize("package", ["h11", "dns"])
def test_a_fanout_without_a_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(package, monkeypatch)
    with pytest.raises(InvalidSettings, match=rf"needs the package {package}.*'broadcache\[fanout\]'"):
        Fanout("web", 80)


def test_a_discovery_by_dns_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without("dns", monkeypatch)
    with pytest.raises(
        InvalidSettings, match=r"the look-up of a service in DNS needs the package dns.*'broadcache\[fanout\]'"
    ):
        DnsDiscovery()


@pytest.mark.parametrize("package", ["h11", "dns"])
def test_no_setting_is_named_where_a_package_is_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(package, monkeypatch)
    with pytest.raises(InvalidSettings, match=rf"^the .* needs the package {package}.*'broadcache\[fanout\]'$"):
        ApiSettings(delivery="both", fanout_service="web:80")
    settings = ApiSettings(fanout_allow=("web:80",))
    with pytest.raises(InvalidSettings, match=rf"^the .* needs the package {package}.*'broadcache\[fanout\]'$"):
        settings.fanout_broadcaster(settings.fanout_policy())
