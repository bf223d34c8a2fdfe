"""Settings: wrong ones are refused with the variable's name, and secrets are shown nowhere."""

import logging
import re
from typing import Annotated

import pytest
from msgspec import Meta

from broadcache.publisher.api.settings import ApiSettings
from broadcache.shared import InvalidSettings
from broadcache.shared.process.serving import is_loopback
from broadcache.shared.process.settings import Settings, read_settings, variable_of
from broadcache.shared.process.tokens import Tokens


class Sample(Settings, frozen=True, kw_only=True):
    sample_seconds: Annotated[float, Meta(gt=0, le=10)] = 5.0
    sample_count: Annotated[int, Meta(ge=0)] = 3
    sample_names: Annotated[tuple[Annotated[str, Meta(min_length=1)], ...], Meta(description="…")] = ()
    sample_is_bold: bool = False
    sample_password: Annotated[str, Meta(min_length=3, extra={"secret": True})] = "unset"


class Needy(Settings, frozen=True, kw_only=True):
    needy_name: str


def test_fields_are_read_from_the_environment_and_converted() -> None:
    environ = {
        "BROADCACHE_SAMPLE_SECONDS": "0.5",
        "BROADCACHE_SAMPLE_COUNT": " 7 ",
        "BROADCACHE_SAMPLE_NAMES": "one, two",
        "BROADCACHE_SAMPLE_IS_BOLD": "true",
        "BROADCACHE_SAMPLE_PASSWORD": "hunter2",
        "HOME": "/nowhere",
    }
    assert read_settings(Sample, environ) == Sample(
        sample_seconds=0.5, sample_count=7, sample_names=("one", "two"), sample_is_bold=True, sample_password="hunter2"
    )


def test_an_argument_wins_over_the_environment() -> None:
    assert read_settings(Sample, {"BROADCACHE_SAMPLE_COUNT": "7"}, sample_count=8).sample_count == 8


def test_an_argument_that_was_not_given_leaves_it_to_the_environment() -> None:
    assert read_settings(Sample, {"BROADCACHE_SAMPLE_COUNT": "7"}, sample_count=None).sample_count == 7


def test_an_argument_hides_a_wrong_variable() -> None:
    assert read_settings(Sample, {"BROADCACHE_SAMPLE_COUNT": "many"}, sample_count=8).sample_count == 8


def test_an_empty_variable_counts_as_unset() -> None:
    assert read_settings(Sample, {"BROADCACHE_SAMPLE_COUNT": "", "BROADCACHE_SAMPLE_NAMES": " "}) == Sample()


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("BROADCACHE_SAMPLE_COUNT", "many", "expected int, got 'many'; correct it, or leave it out for 3"),
        ("BROADCACHE_SAMPLE_COUNT", "-1", "expected int >= 0, got '-1'"),
        ("BROADCACHE_SAMPLE_COUNT", "1.5", "expected int, got '1.5'"),
        ("BROADCACHE_SAMPLE_SECONDS", "nan", "expected float > 0.0, got 'nan'"),
        ("BROADCACHE_SAMPLE_SECONDS", "inf", "expected float <= 10.0, got 'inf'"),
        ("BROADCACHE_SAMPLE_IS_BOLD", "yes", "expected true or false, got 'yes'"),
        ("BROADCACHE_SAMPLE_NAMES", "a,,b", "expected str of length >= 1 as item 2, got 'a,,b'"),
    ],
)
def test_a_wrong_variable_is_named_with_what_was_expected_and_got(variable: str, text: str, said: str) -> None:
    with pytest.raises(InvalidSettings, match=f"^{variable}: {re.escape(said)}"):
        read_settings(Sample, {variable: text})


def test_a_choice_that_is_none_is_told_with_all_of_them() -> None:
    expected = "BROADCACHE_DELIVERY: expected one of redis, fanout, redis-then-fanout, both, got 'http'; correct it"
    with pytest.raises(InvalidSettings, match=re.escape(expected)):
        read_settings(ApiSettings, {"BROADCACHE_DELIVERY": "http"})


def test_a_wrong_secret_is_not_shown() -> None:
    with pytest.raises(InvalidSettings, match="BROADCACHE_SAMPLE_PASSWORD") as caught:
        read_settings(Sample, {"BROADCACHE_SAMPLE_PASSWORD": "q7"})
    assert "q7" not in str(caught.value)


def test_a_wrong_argument_is_named_at_construction() -> None:
    with pytest.raises(InvalidSettings, match="sample_count: expected int, got 'x'"):
        Sample(sample_count="x")  # type: ignore[arg-type]


def test_a_setting_that_must_be_given_is_named_when_it_is_missing() -> None:
    with pytest.raises(InvalidSettings, match=r"BROADCACHE_NEEDY_NAME: expected a value, got none; set it"):
        read_settings(Needy, {})
    assert read_settings(Needy, {"BROADCACHE_NEEDY_NAME": "n"}).needy_name == "n"


def test_an_unknown_variable_is_warned_of_with_the_nearest_known(caplog: pytest.LogCaptureFixture) -> None:
    read_settings(ApiSettings, {"BROADCACHE_LISTEN_PROT": "1", "BROADCACHE_XYZZY": "secret-of-another"})
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "BROADCACHE_LISTEN_PROT is not a known setting" in caplog.text
    assert "did you mean BROADCACHE_LISTEN_PORT?" in caplog.text
    assert "BROADCACHE_XYZZY" in caplog.text
    assert "secret-of-another" not in caplog.text


def test_a_variable_of_another_role_is_no_mistake(caplog: pytest.LogCaptureFixture) -> None:
    read_settings(ApiSettings, {"BROADCACHE_SAMPLE_COUNT": "1"})
    assert not caplog.records


def test_what_kubernetes_injects_for_a_service_of_our_name_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    settings = read_settings(
        ApiSettings,
        {
            "BROADCACHE_PORT": "tcp://10.0.0.1:8000",
            "BROADCACHE_SERVICE_HOST": "10.0.0.1",
            "BROADCACHE_SERVICE_PORT": "8000",
            "BROADCACHE_SERVICE_PORT_HTTP": "8000",
            "BROADCACHE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
            "BROADCACHE_PORT_8000_TCP_PROTO": "tcp",
            "BROADCACHE_PORT_8000_TCP_PORT": "8000",
            "BROADCACHE_PORT_8000_TCP_ADDR": "10.0.0.1",
            "BROADCACHE_REDIS_SERVICE_HOST": "10.0.0.2",
            "BROADCACHE_REDIS_PORT": "udp://10.0.0.2:6379",
        },
    )
    assert settings == ApiSettings()
    assert not caplog.records


def test_no_setting_has_a_name_that_kubernetes_would_inject() -> None:
    injected = re.compile(r"BROADCACHE_(PORT|HOST|.*SERVICE_HOST|.*SERVICE_PORT.*|PORT_.*)")
    assert not [name for name in ApiSettings.__struct_fields__ if injected.fullmatch(variable_of(name))]


def test_secrets_are_not_printed() -> None:
    rich = pytest.importorskip("rich.pretty")
    settings = ApiSettings(redis_url="redis://:hunter2@127.0.0.1", tokens=("swordfish", "ro:sesame"))
    for shown in (repr(settings), str(settings), f"{settings}", rich.pretty_repr(settings)):
        assert "listen_port=8000" in shown
        for secret in ("hunter2", "swordfish", "sesame"):
            assert secret not in shown


def test_every_api_setting_says_what_it_is_for() -> None:
    for annotation in ApiSettings.__annotations__.values():
        assert any(isinstance(meta, Meta) and meta.description for meta in annotation.__metadata__)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "publisher.example", ""])
def test_listening_beyond_loopback_takes_a_token_or_a_clear_word(host: str) -> None:
    with pytest.raises(InvalidSettings, match=r"listen_host|BROADCACHE_LISTEN_HOST"):
        ApiSettings(listen_host=host)
    if host:
        assert ApiSettings(listen_host=host, tokens=("t",)).listen_host == host
        assert ApiSettings(listen_host=host, allow_open=True).listen_host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_takes_no_token(host: str) -> None:
    assert is_loopback(host)
    assert ApiSettings(listen_host=host).tokens == ()


@pytest.mark.parametrize("token", ["two words", "ro:", "admin:t", "ro:rw:t", "tökén", "=", ""])
def test_a_token_that_cannot_be_one_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(InvalidSettings, match="number 2") as caught:
        ApiSettings(tokens=("good", token))
    assert not token.strip("=") or token not in str(caught.value).replace("rw:TOKEN or ro:TOKEN", "")


def test_the_same_token_with_two_rights_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="expected different tokens"):
        ApiSettings(tokens=("ro:same", "same"))


def test_tokens_have_the_right_that_is_written_before_them() -> None:
    tokens = Tokens(["plain", "rw:writer", "ro:reader"])
    given = (b"plain", b"writer", b"reader", b"ro:reader", b"", b"\xff")
    rights = [tokens.authorize([(b"authorization", b"Bearer " + token)]).right for token in given]
    assert rights == ["rw", "rw", "ro", None, None, None]
    assert repr(tokens) == "<3 tokens>"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NAMESPACES": "a/b"}, "AUDIT_NAMESPACES: .* got 'a/b'"),
        ({"NAMESPACES": "users,users"}, "AUDIT_NAMESPACES: expected each namespace once, got 'users,users'"),
        ({"SAMPLE": "0"}, "AUDIT_SAMPLE: expected float > 0.0, got '0'"),
        ({"SAMPLE": "1.1"}, "AUDIT_SAMPLE: expected float <= 1.0, got '1.1'"),
        ({"SOURCE_URL": "file:///{key}"}, "AUDIT_SOURCE_URL: expected http://…/{key}, with"),
        ({"SOURCE_URL": "http://source/"}, "AUDIT_SOURCE_URL: .* {key} behind the host"),
        ({"SOURCE_URL": "http://{key}/"}, "AUDIT_SOURCE_URL: .* behind the host and without user and password"),
    ],
)
def test_an_audit_that_is_set_wrongly_is_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidSettings, match=f"^BROADCACHE_{said}"):
        read_settings(ApiSettings, {f"BROADCACHE_AUDIT_{name}": text for name, text in variables.items()})


def test_only_what_may_be_used_and_is_logged_can_be_audited() -> None:
    audited = ApiSettings(namespaces=("products", "users"), audit_namespaces=("users",), audit_sample=1)
    assert audited.audit_namespaces == ("users",)
    with pytest.raises(InvalidSettings, match=r"some of the namespaces products, got 'users'.*BROADCACHE_NAMESPACES"):
        ApiSettings(namespaces=("products",), audit_namespaces=("users",))
    with pytest.raises(InvalidSettings, match=r"BROADCACHE_AUDIT_NAMESPACES: expected none with .*=fanout"):
        ApiSettings(delivery="fanout", fanout_service="web:80", audit_namespaces=("users",))


def test_a_namespace_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(InvalidSettings, match=r"BROADCACHE_NAMESPACES: .* got 'a/b'"):
        ApiSettings(namespaces=("products", "a/b"))
