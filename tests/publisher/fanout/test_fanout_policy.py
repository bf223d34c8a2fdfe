"""What the fan-out may call: nothing by default, and never an address that is dressed up as something else."""

# ruff: noqa: RUF001 (characters that look like others are what this is about)

import ipaddress
import re
import socket
from collections.abc import Callable
from ipaddress import IPv6Address

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from broadcache.publisher.fanout.policy import Destination, FanoutPolicy, FanoutRefused, InvalidService
from broadcache.publisher.fanout.ranges import REFUSED_RANGES, IPAddress, embedded_in
from broadcache.shared import InvalidSettings

POLICY = FanoutPolicy(["web:8080", "web:metrics", "web.prod.svc.cluster.local:*", "my_db.compose:5432", "localhost:80"])

# Everything that some part of a system reads as an address.
IP_LITERALS = [
    "127.0.0.1",
    "127.0.0.1.",
    "127.0.0.1..",
    "2130706433",
    "2130706433.",
    "017700000001",
    "0x7f000001",
    "0X7F000001",
    "0x7f.1",
    "0x7f.0x0.0x0.0x1",
    "0177.0.0.1",
    "0177.0.0.01",
    "127.1",
    "127.0.1",
    "0",
    "0.0.0.0",
    "00",
    "0x",
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "10.0.0.5",
    "99999999999999999999",
    "256.256.256.256",
    "1.2.3.4.5",
    "web.80",
    "web.0x1f",
    "127.0.0.1 web",
    "127.0.0.1\tweb",
    "127.0.0.1%00.svc.cluster.local",
    "127.0.0.1%20.svc.cluster.local",
    "1%2500.svc.cluster.local/",
    "127%2E0%2E0%2E1",
    "%31%32%37.0.0.1",
    "127%252E0%252E0%252E1",
    "%2531%2532%2537.1",
    "%32130706433",
    "0%78a9fea9fe",
    "::1",
    "::",
    "[::1]",
    "[::1",
    "%5B%3A%3A1%5D",
    "%255B::1%255D",
    "::ffff:127.0.0.1",
    "[::ffff:7f00:1]",
    "::ffff:a9fe:a9fe",
    "64:ff9b::7f00:1",
    "fe80::1%eth0",
    "[fe80::1%25eth0]",
    "fd00:ec2::254",
    "[v1.web]",
    "１２７.０.０.１",
    "127。0。0。1",
    "127．0．0．1",
    "127｡0｡0｡1",
    "①②⑦.⓪.⓪.①",
    "⒈2.3.4",
    "١٢٧.٠.٠.١",
    "१२७.1",
    "𝟏𝟐𝟕.𝟎.𝟎.𝟏",
    "０ｘ７ｆ.１",
    "%EF%BC%91%EF%BC%92%EF%BC%97.0.0.1",
]

MALFORMED_SERVICES = [
    "",
    ".",
    "..",
    ".web",
    "web..",
    "web..prod",
    "-web",
    "web-",
    "web.-prod",
    "_http._tcp.web",
    "web_",
    "w" * 64,
    ".".join(["w" * 63] * 3 + ["w" * 62]),
    "%77eb",
    "web%2Eprod",
    "web%00",
    "web%0d%0aHost:x",
    "web\r\nHost: x",
    "web\n",
    "web\x7f",
    " web",
    "web prod",
    "web:8080",
    "user@web",
    "web/..",
    "web\\prod",
    "web?x",
    "web#x",
    "web*",
    "*",
    "$(id)",
    "wéb",
    "ｗｅｂ",
    "w\u200beb",
    "web\u2024prod",
    "we\u212a",
    "xn--\ud800",
    "127.0.0.1@evil.example/.svc.cluster.local",
    "-.svc.cluster.local",
]

SERVICES_NOT_ALLOWED = [
    "localhost.localdomain",
    "web.staging",
    "web.prod",
    "webb",
    "evil.example",
    "127.0.0.1.nip.io",
    "metadata.google.internal",
    "0xzz",
    "7f000001",
    "web.prod.svc.cluster.local.evil.example",
    "kubernetes.default.svc.cluster.local",
    "169.254.169.254.svc.cluster.local",
]

MALFORMED_PORTS = [
    "",
    "0",
    "00",
    "65536",
    "99999999999",
    "9" * 5_000,
    "-1",
    "+80",
    "080",
    "0080",
    "8080.0",
    " 80",
    "80 ",
    "80\n",
    "80%20",
    "%38%30",
    "8_0",
    "0x50",
    "0X50",
    "0x",
    "http!",
    "http/x",
    "-http",
    "http-",
    "ht--tp",
    "_http",
    "a" * 16,
    "1-2",
    "*",
    "８０",
    "８０８０",
    "٨٠",
    "httｐ",
    "\u212a",
    "80@evil.example",
    "80:80",
]

REFUSED_ADDRESSES = [
    "0.0.0.0",
    "0.1.2.3",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "169.254.170.2",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "192.0.0.192",
    "168.63.129.16",
    "100.100.100.200",
    "::",
    "::1",
    "0:0:0:0:0:0:0:1",
    "::1%lo",
    "fe80::1",
    "fe80::1%eth0",
    "febf::1",
    "fec0::1",
    "ff02::1",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd20:ce::254",
    "fd00:42::42",
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "::ffff:169.254.169.254%eth0",
    "::ffff:0.0.0.0",
    "::127.0.0.1",
    "::a9fe:a9fe",
    "::10.0.0.1",
    "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::127.0.0.1",
    "64:ff9b:1::10.0.0.1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2002:a00:1::1",
    "2001:0:7f00:1::",
    "2001:0:a00:1:0:0:80ff:fffe",
    # What is no address at all is not dialled either.
    "",
    "web",
    "localhost",
    "127.1",
    "0177.0.0.1",
    "127.0.0.01",
    "2130706433",
    "[::1]",
    "127.0.0.1%lo",
    "10.0.0.1%eth0",
    "127.0.0.1 ",
    "127.0.0.1/8",
    "１２７.0.0.1",
]

ORDINARY_ADDRESSES = ["10.42.0.7", "172.17.0.2", "192.168.1.9", "100.64.0.1", "93.184.216.34", "fd12::7", "2a00::1"]


def refusal(call: Callable[[], object]) -> str:
    """What a call is refused for: a rule, or the part that is malformed."""
    with pytest.raises((FanoutRefused, InvalidService)) as caught:
        call()
    error = caught.value
    assert re.search("expected .*got", str(error))
    if isinstance(error, FanoutRefused):
        return error.rule
    assert isinstance(error, InvalidService)
    return error.part


@pytest.mark.parametrize("service", IP_LITERALS, ids=ascii)
def test_a_form_that_can_be_read_as_an_address_is_refused_as_one(service: str) -> None:
    assert refusal(lambda: POLICY.check("POST", service, "8080")) == "ip-literal"
    assert refusal(lambda: POLICY.check("CONNECT", service, "no port!")) == "ip-literal"


@pytest.mark.parametrize("service", MALFORMED_SERVICES, ids=ascii)
def test_a_malformed_service_is_invalid(service: str) -> None:
    assert refusal(lambda: POLICY.check("CONNECT", service, "8080")) == "service"


@pytest.mark.parametrize("port", MALFORMED_PORTS, ids=lambda port: ascii(port[:20]))
def test_a_malformed_port_is_invalid(port: str) -> None:
    assert refusal(lambda: POLICY.check("POST", "web", port)) == "port"
    assert refusal(lambda: POLICY.check("CONNECT", "web.prod.svc.cluster.local", port)) == "port"


@pytest.mark.parametrize("service", SERVICES_NOT_ALLOWED)
def test_a_service_that_is_not_on_the_list_is_refused(service: str) -> None:
    assert refusal(lambda: POLICY.check("POST", service, "8080")) == "service-not-allowed"


@pytest.mark.parametrize("port", ["80", "8081", "metric", "http"])
def test_a_port_that_is_not_on_the_list_is_refused(port: str) -> None:
    assert refusal(lambda: POLICY.check("POST", "web", port)) == "port-not-allowed"


@pytest.mark.parametrize("method", ["CONNECT", "connect", "Connect", "", "GET /", "GET\r\n", "GÉT", "G\x00T", "a:b"])
def test_a_method_that_cannot_be_fanned_out_is_refused(method: str) -> None:
    assert refusal(lambda: POLICY.check(method, "web", "8080")) == "method-not-allowed"
    assert refusal(lambda: POLICY.check(method, "elsewhere", "1")) == "method-not-allowed"


def test_naive_checks_let_most_hostile_forms_through() -> None:
    """The negative control of the tables: without these numbers they might hold only what any check refuses."""

    def is_a_name_to_the_standard_library(text: str) -> bool:
        try:
            ipaddress.ip_address(text)
        except ValueError:
            return True
        return False

    missed = [form for form in IP_LITERALS if is_a_name_to_the_standard_library(form)]
    assert len(missed) >= 0.75 * len(IP_LITERALS)

    everything = IP_LITERALS + MALFORMED_SERVICES + SERVICES_NOT_ALLOWED
    assert len(everything) + len(MALFORMED_PORTS) + len(REFUSED_ADDRESSES) >= 200
    assert len([form for form in everything if form.endswith(".svc.cluster.local")]) >= 6

    known = {"localhost", "127.0.0.1", "0.0.0.0", "::1", "::", "169.254.169.254"}
    assert len([form for form in REFUSED_ADDRESSES if form not in known]) >= 0.85 * len(REFUSED_ADDRESSES)

    assert len([port for port in MALFORMED_PORTS if reads_as_port(port)]) >= 8


def reads_as_port(text: str) -> bool:
    """The check that comes to mind first: `int` takes signs, blanks, underscores, and the digits of all scripts."""
    try:
        return int(text) <= 65_535
    except ValueError:
        return False


def test_what_a_c_library_reads_as_an_address_is_one_that_would_be_refused() -> None:
    read: dict[str, str] = {}
    for form in IP_LITERALS:
        try:
            read[form] = socket.inet_ntoa(socket.inet_aton(form))
        except (OSError, ValueError):
            continue
    loopback = [form for form, address in read.items() if ipaddress.ip_address(address).is_loopback]
    assert {"127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001"} <= set(loopback)
    assert {form for form, address in read.items() if POLICY.permits(address)} <= {"10.0.0.5"}


@pytest.mark.parametrize("host", REFUSED_ADDRESSES, ids=ascii)
@pytest.mark.parametrize("networks", [(), ("0.0.0.0/0", "::/0"), ("96.0.0.0/3", "fc00::/6", "::/8", "2000::/3")])
def test_a_refused_address_stays_refused_however_wide_the_networks_are(host: str, networks: tuple[str, ...]) -> None:
    policy = FanoutPolicy(["web:80"], networks=networks)
    assert refusal(lambda: policy.check_address(host)) == "address-refused"
    assert not policy.permits(host)


@pytest.mark.parametrize("host", ORDINARY_ADDRESSES)
def test_an_ordinary_address_is_permitted(host: str) -> None:
    POLICY.check_address(host)
    assert POLICY.permits(host)


@pytest.mark.parametrize(
    ("network", "inside", "outside"),
    [
        ("127.0.0.0/8", "127.9.9.9", "10.0.0.1"),
        ("127.0.0.0/8", "::ffff:127.9.9.9", "::1"),
        ("127.0.0.2/32", "127.0.0.2", "127.0.0.3"),
        ("127.0.0.2", "127.0.0.2", "127.0.0.1"),
        ("::ffff:127.0.0.0/104", "127.0.0.1", "128.0.0.1"),
        ("169.254.0.0/17", "169.254.1.1", "169.254.169.254"),
        ("::1/128", "::1", "::2"),
        ("fe80::/64", "fe80::1%eth0", "fe80:0:0:1::1"),
        ("100.100.100.200/32", "100.100.100.200", "100.100.100.201"),
        ("64:ff9b::/96", "64:ff9b::10.0.0.1", "64:ff9b::127.0.0.1"),
        ("64:ff9b:1::/48", "64:ff9b:1::10.0.0.1", "64:ff9b:1::169.254.169.254"),
        ("64:ff9b:1::/48", "64:ff9b:1:a00:0:100::", "64:ff9b:1:7f00:0:100::"),
        ("64:ff9b:1::/48", "64:ff9b:1:a:0:1::", "64:ff9b:1:7f:0:1::"),
        ("64:ff9b:1::/48", "64:ff9b:1::10.0.0.1", "64:ff9b:1::"),
        ("64:ff9b:1::/48", "64:ff9b:1:0:a:0:100:0", "64:ff9b:1:0:7f:0:100:0"),
        ("2002::/16", "2002:a00:1::1", "2002:a9fe:a9fe::1"),
        ("2001::/32", "2001:0:a00:1::f5ff:fffe", "2001:0:7f00:1::f5ff:fffe"),
        ("2001::/32", "2001:0:a00:1::f5ff:fffe", "2001:0:a00:1::80ff:fffe"),
        ("::/96", "::10.0.0.1", "::127.0.0.1"),
        ("::/96", "::10.0.0.1", "::1"),
        ("::ffff:0:0:0/96", "::ffff:0:10.0.0.1", "::ffff:0:127.0.0.1"),
        ("10.42.0.0/16", "10.42.255.255", "10.43.0.0"),
        ("10.42.0.0/16", "::ffff:10.42.0.1", "fd12::1"),
    ],
)
def test_a_network_permits_what_lies_in_it_and_nothing_else(network: str, inside: str, outside: str) -> None:
    policy = FanoutPolicy(["web:80"], networks=[network])
    policy.check_address(inside)
    assert not policy.permits(outside)


def test_an_address_in_disguise_is_permitted_when_both_of_its_faces_are() -> None:
    host = "64:ff9b::127.0.0.1"
    assert not FanoutPolicy(["web:80"], networks=["64:ff9b::/96"]).permits(host)
    assert not FanoutPolicy(["web:80"], networks=["127.0.0.0/8"]).permits(host)
    assert FanoutPolicy(["web:80"], networks=["64:ff9b::/96", "127.0.0.0/8"]).permits(host)


def test_networks_that_are_named_close_all_others() -> None:
    policy = FanoutPolicy(["web:80"], networks=["127.0.0.0/8", "10.0.0.0/8"])
    assert policy.permits("127.0.0.1")
    assert policy.permits("10.1.1.1")
    assert refusal(lambda: policy.check_address("192.168.0.1")) == "address-not-allowed"
    assert refusal(lambda: policy.check_address("fd12::1")) == "address-not-allowed"
    assert refusal(lambda: policy.check_address("::1")) == "address-refused"


@pytest.mark.parametrize(
    ("service", "port", "expected"),
    [
        ("web", "8080", Destination("web", "web", 8080)),
        ("WEB", "8080", Destination("web", "web", 8080)),
        ("Web.", "8080", Destination("web.", "web", 8080)),
        ("web", "Metrics", Destination("web", "web", "metrics")),
        (
            "web.prod.svc.cluster.local.",
            "1",
            Destination("web.prod.svc.cluster.local.", "web.prod.svc.cluster.local", 1),
        ),
        (
            "web.PROD.svc.cluster.local",
            "65535",
            Destination("web.prod.svc.cluster.local", "web.prod.svc.cluster.local", 65535),
        ),
        (
            "web.prod.svc.cluster.local",
            "h2-c-15-letters",
            Destination("web.prod.svc.cluster.local", "web.prod.svc.cluster.local", "h2-c-15-letters"),
        ),
        ("my_db.compose", "5432", Destination("my_db.compose", "my_db.compose", 5432)),
        ("localhost", "80", Destination("localhost", "localhost", 80)),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PURGE", "BAN", "TRACE", "x-anything", "M-SEARCH"])
def test_what_is_on_the_list_is_allowed(method: str, service: str, port: str, expected: Destination) -> None:
    assert POLICY.check(method, service, port) == expected


def test_a_name_of_the_greatest_length_is_allowed() -> None:
    name = ".".join(["w" * 63] * 3 + ["w" * 61])
    assert len(name) == 253
    assert FanoutPolicy([f"{name}:80"]).check("GET", f"{name}.", "80").name == name


def test_an_absolute_name_on_the_list_allows_the_relative_form_as_well() -> None:
    policy = FanoutPolicy(["Web.Prod.:Http"])
    assert policy.check("GET", "web.prod", "http") == ("web.prod", "web.prod", "http")
    assert policy.check("GET", "web.prod.", "HTTP") == ("web.prod.", "web.prod", "http")


def test_ports_of_one_service_may_stand_in_several_items() -> None:
    policy = FanoutPolicy([" web:80", "web:http ", "db:*", "db:5432"])
    assert [policy.check("GET", "web", port).port for port in ("80", "http")] == [80, "http"]
    assert policy.check("GET", "db", "any-name").port == "any-name"


def test_only_the_methods_on_their_list_are_allowed() -> None:
    policy = FanoutPolicy(["web:80"], methods=["post", " PURGE "])
    assert policy.check("POST", "web", "80") == policy.check("PURGE", "web", "80")
    assert refusal(lambda: policy.check("GET", "web", "80")) == "method-not-allowed"
    assert refusal(lambda: policy.check("post", "web", "80")) == "method-not-allowed"
    assert refusal(lambda: policy.check("CONNECT", "web", "80")) == "method-not-allowed"


@pytest.mark.parametrize("service", ["web", "127.0.0.1", "", "\x00"])
@pytest.mark.parametrize("port", ["80", "no port!"])
@pytest.mark.parametrize("method", ["GET", "CONNECT"])
def test_a_fan_out_that_allows_nothing_is_off_whatever_is_asked(method: str, service: str, port: str) -> None:
    policy = FanoutPolicy([])
    assert policy.is_off
    assert not POLICY.is_off
    with pytest.raises(FanoutRefused, match="set BROADCACHE_FANOUT_ALLOW=service:port") as caught:
        policy.check(method, service, port)
    assert caught.value.rule == "fan-out-off"


@pytest.mark.parametrize(
    ("method", "service", "port", "variable"),
    [
        ("GET", "elsewhere", "80", "BROADCACHE_FANOUT_ALLOW"),
        ("GET", "web", "80", "BROADCACHE_FANOUT_ALLOW"),
        ("GET", "127.1", "80", "BROADCACHE_FANOUT_ALLOW"),
        ("CONNECT", "web", "8080", "BROADCACHE_FANOUT_METHODS"),
    ],
)
def test_a_refusal_names_the_variable_that_decides(method: str, service: str, port: str, variable: str) -> None:
    with pytest.raises(FanoutRefused, match=variable):
        POLICY.check(method, service, port)


def test_the_refusal_of_an_address_names_its_range_and_the_variable() -> None:
    with pytest.raises(FanoutRefused) as caught:
        POLICY.check_address("::ffff:169.254.169.254")
    assert str(caught.value) == (
        "expected an address of a replica, got '::ffff:169.254.169.254': 169.254.169.254 lies in 169.254.0.0/16 "
        "(link-local, with the metadata services of clouds); name that network, or a part of it, in "
        "BROADCACHE_FANOUT_NETWORKS if it may be called"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"allow": ["web:80", "web"]}, "BROADCACHE_FANOUT_ALLOW: expected service:port, .* as item 2, got 'web'"),
        ({"allow": ["web:80", ""]}, "BROADCACHE_FANOUT_ALLOW: expected service:port, .* as item 2, got ''"),
        ({"allow": [":80"]}, "BROADCACHE_FANOUT_ALLOW: in item 1, expected the name of a service, .* got ''"),
        ({"allow": ["web:"]}, "BROADCACHE_FANOUT_ALLOW: in item 1, expected a number .* got '' as the port"),
        ({"allow": ["web:0"]}, "BROADCACHE_FANOUT_ALLOW: in item 1, expected a number .* got '0' as the port"),
        ({"allow": ["*:80"]}, r"BROADCACHE_FANOUT_ALLOW: in item 1, expected the name of a service, .* got '\*'"),
        ({"allow": ["10.0.0.1:80"]}, "BROADCACHE_FANOUT_ALLOW: in item 1, .* can be read as an IP address"),
        ({"allow": ["[::1]:80"]}, "BROADCACHE_FANOUT_ALLOW: in item 1, .* can be read as an IP address"),
        ({"allow": "web:80"}, "BROADCACHE_FANOUT_ALLOW: expected a list of strings, got a string, 'web:80'"),
        ({"networks": ["10.0.0.0/8", "10.0.0.1/8"]}, "BROADCACHE_FANOUT_NETWORKS: .* as item 2, got '10.0.0.1/8'"),
        ({"networks": ["10.0.0.0/33"]}, "BROADCACHE_FANOUT_NETWORKS: .* as item 1, got '10.0.0.0/33'"),
        ({"networks": ["pods"]}, "BROADCACHE_FANOUT_NETWORKS: .* as item 1, got 'pods'"),
        ({"networks": [""]}, "BROADCACHE_FANOUT_NETWORKS: .* as item 1, got ''"),
        ({"networks": ["fe80::%eth0/64"]}, "BROADCACHE_FANOUT_NETWORKS: .* as item 1, got 'fe80::%eth0/64'"),
        ({"networks": "::/0"}, "BROADCACHE_FANOUT_NETWORKS: expected a list of strings, got a string, '::/0'"),
        ({"methods": ["GET", "G T"]}, "BROADCACHE_FANOUT_METHODS: .* as item 2, got 'G T'"),
        ({"methods": ["connect"]}, "BROADCACHE_FANOUT_METHODS: .* as item 1, got 'connect'"),
        ({"methods": [""]}, "BROADCACHE_FANOUT_METHODS: .* as item 1, got ''"),
        ({"methods": "GET"}, "BROADCACHE_FANOUT_METHODS: expected a list of strings, got a string, 'GET'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_item(settings: dict[str, list[str]], said: str) -> None:
    with pytest.raises(InvalidSettings, match=f"^{said}"):
        FanoutPolicy(**{"allow": ["web:80"], **settings})


texts = st.text(st.characters(), max_size=300) | st.text("0123456789abcfx.:%[]-_ ", max_size=20)
addresses = st.ip_addresses() | st.sampled_from(REFUSED_RANGES).flatmap(
    lambda refused: st.ip_addresses(network=refused.network)
)
names_of_labels = st.from_regex(r"(?a)[a-z0-9]([a-z0-9_-]{0,9}[a-z0-9])?(\.[a-z]{1,9}){0,3}\.?", fullmatch=True)


@given(
    method=st.sampled_from(["GET", "PURGE"]) | texts,
    service=st.sampled_from(["web", "WEB.", "db"]) | names_of_labels | texts,
    port=st.sampled_from(["8080", "http"]) | st.integers(-9, 99_999).map(str) | texts,
)
def test_anything_is_refused_or_is_a_destination_on_the_list(method: str, service: str, port: str) -> None:
    policy = FanoutPolicy(["web:8080", "db:*"])
    try:
        destination = policy.check(method, service, port)
    except (FanoutRefused, InvalidService) as error:
        assert_says_little(error)
        return
    assert destination.service == service.lower()
    assert destination.name == destination.service.removesuffix(".")
    assert destination.name in {"web", "db"}
    assert destination.name == "db" or destination.port == 8080
    if isinstance(destination.port, int):
        assert 1 <= destination.port <= 65_535
        assert str(destination.port) == port
    else:
        assert re.fullmatch("(?=.*[a-z])[a-z0-9-]{1,15}", destination.port)
        assert "--" not in f"-{destination.port}-"
        assert destination.port == port.lower()
    assert re.fullmatch(r"[^\s()<>@,;:\\\"/\[\]?={}\x00-\x20\x7f-\U0010ffff]+", method)
    assert method.upper() != "CONNECT"


@given(service=names_of_labels)
def test_a_name_that_does_not_end_in_a_number_is_allowed_when_it_is_on_the_list(service: str) -> None:
    last = service.removesuffix(".").split(".")[-1]
    if last.isdigit() or re.fullmatch("0x[0-9a-f]*", last):
        with pytest.raises(InvalidSettings, match="IP address"):
            FanoutPolicy([f"{service}:80"])
    else:
        assert FanoutPolicy([f"{service}:80"]).check("GET", service, "80").service == service


@given(host=texts)
def test_any_text_as_an_address_is_permitted_or_refused(host: str) -> None:
    try:
        POLICY.check_address(host)
    except FanoutRefused as error:
        assert_says_little(error)
    else:
        ipaddress.ip_address(host)


def assert_says_little(error: Exception) -> None:
    text = str(error)
    assert text.isprintable()
    assert text.replace("…", "").isascii()
    assert len(text) <= 400


@pytest.mark.parametrize("unit", ["W", "7", "\x00", "%00", "\u212a"], ids=ascii)
def test_no_error_repeats_more_than_a_hundred_characters_of_what_came(unit: str) -> None:
    hostile = unit * 10_000
    calls: list[Callable[[], object]] = [
        lambda: POLICY.check("GET", hostile, "80"),
        lambda: POLICY.check("GET", f"{'W.' * 100}W", "80"),
        lambda: POLICY.check("GET", "web", hostile),
        lambda: POLICY.check(f"{hostile} ", "web", "8080"),
        lambda: FanoutPolicy(["web:80"], methods=["GET"]).check(f"W{hostile}", "web", "80"),
        lambda: POLICY.check_address(hostile),
        lambda: POLICY.check_address(f"fe80::1%{hostile.replace('%', '-')}"),
        lambda: FanoutPolicy([hostile]),
        lambda: FanoutPolicy([f"{hostile}:80"]),
        lambda: FanoutPolicy([f"web:{hostile}"]),
        lambda: FanoutPolicy(hostile),
        lambda: FanoutPolicy([], networks=[hostile]),
        lambda: FanoutPolicy([], methods=[f"{hostile} x"]),
    ]
    for call in calls:
        text = text_of(call)
        assert text.isprintable()
        quotes = re.findall("'[^']*(?:'|…)", text)
        assert quotes
        assert sum(len(quote) for quote in quotes) <= 100
        assert len(text) <= 400


def text_of(call: Callable[[], object]) -> str:
    with pytest.raises((FanoutRefused, InvalidService, InvalidSettings)) as caught:
        call()
    return str(caught.value)


@given(address=addresses)
def test_an_address_is_permitted_by_default_if_and_only_if_it_lies_in_no_refused_range(address: IPAddress) -> None:
    meant = (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
    is_refused = any(meant in refused.network for refused in REFUSED_RANGES)
    assert POLICY.permits(str(address)) is not is_refused


@given(address=addresses, prefix=st.integers(0, 128))
def test_a_network_opens_a_refused_range_only_from_within(address: IPAddress, prefix: int) -> None:
    assume(not (isinstance(address, IPv6Address) and address.ipv4_mapped))
    network = ipaddress.ip_network(f"{address}/{min(prefix, address.max_prefixlen)}", strict=False)
    concerned = [refused.network for refused in REFUSED_RANGES if address in refused.network]
    is_opened = all(network.prefixlen >= refused.prefixlen for refused in concerned)
    is_harmless_inside = all(POLICY.permits(str(embedded)) for embedded in embedded_in(address))
    permits = FanoutPolicy(["web:80"], networks=[str(network)]).permits
    assert permits(str(address)) is (is_opened and is_harmless_inside)
