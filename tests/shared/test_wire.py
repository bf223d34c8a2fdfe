"""The wire form, version 1: golden frames, the JSON Schema, splitting, and frames that cannot be read."""

import json
import random
from importlib.resources import files

import jsonschema
import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.paths import GOLDEN, ROOT

from broadcache.shared import Everything, Invalidation, Keys, MalformedFrame, Prefixes, Tags, Target
from broadcache.shared.confirmation import decode_reports, encode_reports
from broadcache.shared.invalidation import REQUEST_NAMES_MAX, invalidation_of
from broadcache.shared.transport.redis.log import names_of
from broadcache.shared.wire import FRAME_BYTES_MAX, decode, encode, encode_tails, encode_unsequenced

SCHEMA = json.loads(files("broadcache.shared").joinpath("wire.schema.json").read_text("utf-8"))
NAMESPACE = "products"
REPRODUCIBLE = settings(derandomize=True, database=None, deadline=None, max_examples=300)
# What the log's script puts in front of a tail, at its longest.
LONGEST_HEAD = '{"v":1,"epoch":"01JDCM00000000000000000000","seq":9007199254740991,'


def golden(kind: str) -> dict[str, bytes]:
    """The frames of one kind by name. A text file ends in a newline, a frame does not."""
    return {path.stem: path.read_bytes().removesuffix(b"\n") for path in sorted(GOLDEN.glob(f"{kind}-*.json"))}


CANONICAL, FOREIGN, MALFORMED = golden("canonical"), golden("foreign"), golden("malformed")
READABLE = CANONICAL | FOREIGN


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


def test_there_are_golden_frames_of_each_kind() -> None:
    assert min(len(CANONICAL), len(FOREIGN), len(MALFORMED)) >= 4
    assert len(READABLE | MALFORMED) == len(list(GOLDEN.iterdir()))


# --- golden frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CANONICAL)
def test_a_golden_frame_is_read_and_written_byte_for_byte(name: str) -> None:
    assert encode(decode(CANONICAL[name], NAMESPACE)) == CANONICAL[name]


@pytest.mark.parametrize("name", READABLE)
def test_a_golden_frame_is_read_as_its_json_says(name: str) -> None:
    invalidation = decode(READABLE[name], NAMESPACE)
    said = json.loads(READABLE[name])
    for field in Invalidation.__struct_fields__:
        if field in said:
            value = getattr(invalidation, field)
            assert (list(value) if isinstance(value, tuple) else value) == said[field]


@pytest.mark.parametrize("name", READABLE)
def test_the_schema_accepts_every_frame_that_can_be_read(name: str, schema: jsonschema.Draft202012Validator) -> None:
    schema.validate(json.loads(READABLE[name]))


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_frame_is_refused_with_its_beginning_or_its_place(name: str) -> None:
    with pytest.raises(MalformedFrame, match=r"^invalid frame: "):
        decode(MALFORMED[name], NAMESPACE)


@pytest.mark.parametrize("name", MALFORMED)
def test_the_schema_refuses_every_frame_that_cannot_be_read(name: str, schema: jsonschema.Draft202012Validator) -> None:
    try:
        document = json.loads(MALFORMED[name])
    except json.JSONDecodeError:
        return
    assert not schema.is_valid(document)


def test_the_schema_describes_every_field_and_no_other() -> None:
    described = SCHEMA["properties"]
    assert list(described) == list(Invalidation.__struct_fields__)
    assert all(field["description"] for field in described.values())
    # The only field that is not written when it has its default.
    defaults = {name: field["default"] for name, field in described.items() if name != "traceparent"}
    assert defaults == json.loads(encode(Invalidation()))


def test_a_field_left_out_has_its_default() -> None:
    assert decode(b'{"keys":["a"]}', NAMESPACE) == Invalidation(keys=("a",))


def test_a_foreign_frame_has_no_position() -> None:
    assert [decode(frame, NAMESPACE).position for frame in FOREIGN.values()] == [None] * len(FOREIGN)


def test_unknown_fields_are_skipped() -> None:
    frame = FOREIGN["foreign-with-unknown-fields"]
    assert decode(frame, NAMESPACE) == Invalidation(keys=("product:42",))


# --- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (b'{"v":2,"keys":["a"]}', "expected version 1, got 2 at $.v"),
        (b'{"keys":[7]}', "Expected `str`, got `int` - at `$.keys[0]`"),
        (b'{"keys":[]}', "expected at least one of keys, tags, prefixes or everything, got none"),
        (b'{"keys":["a"],"namespace":"orders"}', "expected namespace 'products', that of its channel, got 'orders'"),
        (b'{"keys":["a"],"seq":1}', "expected epoch and seq together, got one of them"),
        (b"x" * (FRAME_BYTES_MAX + 1), "expected at most 65536 bytes, got 65537"),
        (b"now", "it begins b'now'"),
        (b'{"keys":["\xff"]}', "it begins"),
    ],
)
def test_the_error_says_what_was_expected_and_what_came(frame: bytes, text: str) -> None:
    with pytest.raises(MalformedFrame) as error:
        decode(frame, NAMESPACE)
    assert text in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b" ",
        b"null",
        b"true",
        b"{}",
        b"\x00",
        b"\xff\xfe",
        b'\xef\xbb\xbf{"keys":["a"]}',  # a byte order mark
        b'{"keys":["a"]} {"keys":["b"]}',
        b'{"keys":["\\ud800"]}',  # half a surrogate pair, escaped
        b'{"keys":["\xed\xa0\x80"]}',  # the same, as bytes
        b'{"keys":["a"],"skipped":"\\ud800"}',
        b'{"keys":["a"],"seq":' + b"9" * 5_000 + b',"epoch":"e"}',
        b'{"keys":["a"],"seq":1e400,"epoch":"e"}',
        b'{"keys":["a"],"seq":1.0,"epoch":"e"}',
        b'{"keys":["a"],"seq":-0.5,"epoch":"e"}',
        b'{"keys":["a"],"seq":NaN,"epoch":"e"}',
        b'{"keys":["a"],"v":true}',
        b'{"keys":["a"],"v":1180591620717411303424}',
        b"[" * 60_000,
        b'{"skipped":' + b"[" * 60_000,
        b'{"keys":' + b"[" * 60_000 + b"]" * 5_000 + b"}",
        b'{"a":' * 12_000 + b"1" + b"}" * 5_000,
    ],
    ids=range(23),
)
def test_hostile_bytes_are_a_malformed_frame_and_nothing_else(frame: bytes) -> None:
    with pytest.raises(MalformedFrame):
        decode(frame, NAMESPACE)


def read_or_refused(frame: bytes) -> None:
    """Either a valid invalidation comes out, or MalformedFrame does: any other exception fails the test."""
    try:
        invalidation = decode(frame, NAMESPACE)
    except MalformedFrame:
        return
    names = (*invalidation.keys, *invalidation.tags, *invalidation.prefixes)
    assert names or invalidation.everything
    for name in names:
        name.encode()  # no half surrogates: a replica hashes, logs and compares them
    if invalidation.position is not None:
        assert 0 <= invalidation.position.sequence < 2**53
    assert decode(encode(invalidation), NAMESPACE) == invalidation


@settings(REPRODUCIBLE)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(frame: bytes) -> None:
    read_or_refused(frame)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(REPRODUCIBLE)
@given(st.dictionaries(st.sampled_from([*Invalidation.__struct_fields__, "else"]), JSON_VALUES, max_size=6))
def test_any_values_in_its_fields_are_read_or_refused(fields: dict[str, object]) -> None:
    read_or_refused(json.dumps({"keys": ["a"]} | fields).encode())


def test_a_golden_frame_with_a_few_bytes_changed_is_read_or_refused() -> None:
    drawn = random.Random(42)
    frames = list(READABLE.values())
    for _ in range(5_000):
        frame = bytearray(drawn.choice(frames))
        for _ in range(drawn.randint(1, 3)):
            place = drawn.randrange(len(frame))
            match drawn.randrange(3):
                case 0:
                    frame[place] = drawn.randrange(256)
                case 1:
                    del frame[place : place + drawn.randint(1, 8)]
                    frame = frame or bytearray(b" ")
                case _:
                    frame[place:place] = drawn.choice([b'"', b"{", b"]", b",", b"\\", b"9" * 30, b"\xf0\x9f", b"null"])
        read_or_refused(bytes(frame))


# --- writing and splitting -------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(REPRODUCIBLE)
@given(st.lists(NAMES, max_size=5), st.lists(NAMES, max_size=5), st.lists(NAMES, min_size=1, max_size=5))
def test_what_is_written_is_read_back(keys: list[str], tags: list[str], prefixes: list[str]) -> None:
    invalidation = Invalidation(
        keys=tuple(keys), tags=tuple(tags), prefixes=tuple(prefixes), epoch="e", seq=1, namespace=NAMESPACE
    )
    assert decode(encode(invalidation), NAMESPACE) == invalidation


def frames_of(invalidation: Invalidation) -> list[bytes]:
    return [LONGEST_HEAD.encode() + tail for tail in encode_tails(invalidation)]


def test_one_that_fits_is_one_frame_with_its_own_id() -> None:
    invalidation = invalidation_of([Keys("a"), Tags("t")], namespace=NAMESPACE, reason="why")
    (frame,) = frames_of(invalidation)
    read = decode(frame, NAMESPACE)
    assert read.position == ("01JDCM00000000000000000000", 2**53 - 1)
    assert msgspec.structs.replace(read, epoch=None, seq=None) == invalidation


def test_everything_is_one_frame() -> None:
    (frame,) = frames_of(invalidation_of([Everything()], namespace=NAMESPACE))
    assert decode(frame, NAMESPACE).everything


LARGE: dict[str, list[Target]] = {
    "long keys": [Keys(*(f"{number:04}".ljust(1_024, "k") for number in range(300)))],
    "as many as may be": [Keys(*(f"product:{number}" for number in range(REQUEST_NAMES_MAX)))],
    "of each kind": [
        Keys(*(f"key:{number}" for number in range(3_000))),
        Tags(*(f"tag:{number}" for number in range(3_000))),
        Prefixes(*(f"prefix:{number}" for number in range(3_000))),
    ],
    "escaped to six times their size": [Keys(*(f"{number:03}" + "\x01" * 1_000 for number in range(100)))],
    "beyond ASCII": [Tags(*(f"{number:03}" + "🍎" * 60 for number in range(500)))],
}


@pytest.mark.parametrize("large", LARGE)
def test_a_split_invalidation_keeps_every_name_once_in_frames_that_fit(large: str) -> None:
    invalidation = invalidation_of(
        LARGE[large], namespace=NAMESPACE, reason="\x01" * 1_024, source="\x01" * 128, id="i" * 128
    )
    frames = frames_of(invalidation)
    parts = [decode(frame, NAMESPACE) for frame in frames]
    assert len(parts) > 1
    assert max(map(len, frames)) <= FRAME_BYTES_MAX
    assert [part.id for part in parts] == [f"{invalidation.id}.{number}" for number in range(1, len(parts) + 1)]
    assert [name for part in parts for name in part.keys] == list(invalidation.keys)
    assert [name for part in parts for name in part.tags] == list(invalidation.tags)
    assert [name for part in parts for name in part.prefixes] == list(invalidation.prefixes)
    assert {(part.reason, part.source, part.sent_at_ms) for part in parts} == {
        (invalidation.reason, invalidation.source, invalidation.sent_at_ms)
    }


@pytest.mark.parametrize("beyond_bytes", [-1, 0, 1])
def test_a_frame_is_split_when_it_would_be_one_byte_too_long(beyond_bytes: int) -> None:
    names = [f"{number:04}".ljust(1_010, "k") for number in range(64)]
    length = len(frames_of(invalidation_of([Keys(*names)], namespace=NAMESPACE))[0])
    filler = "f" * (FRAME_BYTES_MAX - length - len(',""') + beyond_bytes)
    frames = frames_of(invalidation_of([Keys(*names, filler)], namespace=NAMESPACE))
    assert len(frames) == (2 if beyond_bytes > 0 else 1)
    assert max(map(len, frames)) <= FRAME_BYTES_MAX


# --- the AsyncAPI document -------------------------------------------------------------------------------------------


def test_the_asyncapi_document_points_at_the_schema_and_its_examples_are_frames(
    schema: jsonschema.Draft202012Validator,
) -> None:
    document = yaml.safe_load((ROOT / "docs" / "asyncapi.yaml").read_text())
    message = document["components"]["messages"]["invalidation"]
    assert (ROOT / "docs" / message["payload"]["schema"]["$ref"]).resolve() == ROOT / "shared" / "wire.schema.json"
    for example in message["examples"]:
        schema.validate(example["payload"])
        assert decode(msgspec.json.encode(example["payload"]), "products").keys == ("product:42",)
    assert document["channels"]["invalidations"]["address"].format(namespace="products") == names_of("products").channel


def test_the_asyncapi_documents_reports_are_read_and_its_channel_is_the_real_one() -> None:
    document = yaml.safe_load((ROOT / "docs" / "asyncapi.yaml").read_text())
    message = document["components"]["messages"]["reports"]
    for example in message["examples"]:
        jsonschema.Draft202012Validator(message["payload"]).validate(example["payload"])
        read = decode_reports(msgspec.json.encode(example["payload"]))
        assert msgspec.json.decode(encode_reports(read.replica, read.reports)) == example["payload"]
    channel = document["channels"]["confirmations"]["parameters"]["channel"]
    assert channel["examples"] == [names_of("products").confirmed]
    assert names_of("default").confirmed in channel["description"]


@pytest.mark.parametrize("names_count", [1, 500])
def test_what_is_sent_past_the_log_has_the_parts_and_ids_of_what_is_logged(names_count: int) -> None:
    keys = Keys(*[f"{number:04}".ljust(1_000, "x") for number in range(names_count)])
    invalidation = invalidation_of([keys, Tags("t")], namespace=NAMESPACE, reason="why")
    frames = encode_unsequenced(invalidation)
    logged = [decode(LONGEST_HEAD.encode() + tail, NAMESPACE) for tail in encode_tails(invalidation)]
    unsequenced = [decode(frame, NAMESPACE) for frame in frames]
    assert unsequenced == [msgspec.structs.replace(each, epoch=None, seq=None) for each in logged]
    assert (len(frames) > 1) == (names_count > 1)
    assert max(map(len, frames)) <= FRAME_BYTES_MAX
