"""The rights that a publisher and a replica need, and how to check them without any effect."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Literal, NamedTuple, TypeAlias

from ...shared.confirmation import encode_reports
from ...shared.transport.redis.link import Argument, Link, Refused
from ...shared.transport.redis.names import Names

__all__ = ["ROLES", "Right", "Role", "missing_of", "rights_of"]

Role: TypeAlias = Literal["publisher", "replica"]
ROLES: Final[tuple[Role, ...]] = ("publisher", "replica")

# Checks each command without running it. Needs only the right to run scripts, which both roles need anyway. Servers
# before Redis 7 do not support it.
_CHECK_SCRIPT: Final = """
if not redis.acl_check_cmd then return false end
local missing, place, number = {}, 1, 0
while ARGV[place] do
  local count = tonumber(ARGV[place])
  number = number + 1
  local is_known, is_allowed = pcall(redis.acl_check_cmd, unpack(ARGV, place + 1, place + count))
  if not (is_known and is_allowed) then missing[#missing + 1] = number end
  place = place + count + 1
end
return missing
"""
_UNKNOWN_SHA: Final = "0" * 40


class Right(NamedTuple):
    """One command that a role runs, with its key or channel.

    Shape:  `name` as in ACL rules, e.g. `client|setname`. `command` is one that the role runs. `harmless` has no effect
            where it is allowed: it is for servers on which rights must be tried. `reach` is the key or channel, as in
            an ACL rule; empty if there is none. `is_for_answers` if the role works without it, and only cannot query
            replicas, or answer.
    """

    role: Role
    name: str
    command: tuple[Argument, ...]
    harmless: tuple[Argument, ...]
    reach: str = ""
    is_for_answers: bool = False


def rights_of(
    names: Names, *, roles: Sequence[Role] = ROLES, is_sharded: bool, me: str, older: Names | None = None
) -> list[Right]:
    """Return the rights that these roles need for the namespace of these names.

    `me` is the id of a replica that does not exist. `older` are the names of older versions in the same database.

    Source: docs/redis.md, Rights.
    """
    of_role = {"publisher": (_of_publisher, _of_asking), "replica": (_of_replica, _of_answering)}
    sharded = "S" if is_sharded else ""
    rights = [right for role in roles for some in of_role[role] for right in some(names, sharded, me)]
    if older is not None:
        command = ("HMGET", older.head, "epoch")
        rights += [Right(role, "hmget", command, command, _reach_of(older)) for role in roles]
    return rights


def _of_replica(names: Names, sharded: str, me: str) -> list[Right]:
    channel = names.channel
    own_channel = names.echo_prefix + me
    key = names.presence_prefix + me
    reach = _reach_of(names)
    # The right to the replica's own channel alone is not the right to the namespace's.
    reach_of_echo = f"&{channel} &{names.echo_prefix}*"
    registry = names.registry
    nowhere = f"{{{channel}}}:doctor:{me}"

    def right(name: str, *command: Argument, harmless: tuple[Argument, ...] = (), reach: str = reach) -> Right:
        return Right("replica", name, command, harmless or command, reach)

    return [
        right("client|setname", "CLIENT", "SETNAME", "broadcache:doctor", reach=""),
        right("info", "INFO", "server", reach=""),
        right(f"{sharded}subscribe".lower(), f"{sharded}SUBSCRIBE", channel, own_channel, reach=reach_of_echo),
        right(f"{sharded}unsubscribe".lower(), f"{sharded}UNSUBSCRIBE", channel, own_channel, reach=""),
        right("evalsha", "EVALSHA", _UNKNOWN_SHA, 1, key),
        right("eval", "EVAL", "return 1", 1, key),
        right("set", "SET", key, "", "PX", 1, harmless=("SET", key, "", "XX", "PX", 1)),
        right(f"{sharded}publish".lower(), f"{sharded}PUBLISH", own_channel, "", reach=f"&{names.echo_prefix}*"),
        right("hmget", "HMGET", names.head, "epoch"),
        # The first echo creates the head. A field without a value: refused, but not for a lack of rights.
        right("hset", "HSET", names.head, "epoch", "", harmless=("HSET", nowhere, "a", "b", "c")),
        right("xrange", "XRANGE", names.log, "-", "+", "COUNT", 1),
        # To register, and to deregister when it closes.
        right("time", "TIME", reach=""),
        right("zadd", "ZADD", registry, 0, me, harmless=("ZADD", nowhere, "XX", 0, me)),
        right("zrangebyscore", "ZRANGEBYSCORE", registry, 0, 0),
        right("zrem", "ZREM", registry, me),
        right("pexpire", "PEXPIRE", registry, 1, harmless=("PEXPIRE", nowhere, 1)),
        right("del", "DEL", key, harmless=("DEL", nowhere)),
    ]


def _of_publisher(names: Names, sharded: str, me: str) -> list[Right]:
    channel, head, log = names.channel, names.head, names.log
    receipt = f"{names.receipt_prefix}{me}"
    nowhere = f"{{{channel}}}:doctor:{me}"
    reach = _reach_of(names)

    def right(name: str, *command: Argument, harmless: tuple[Argument, ...] = (), reach: str = reach) -> Right:
        return Right("publisher", name, command, harmless or command, reach)

    return [
        right("client|setname", "CLIENT", "SETNAME", "broadcache:doctor", reach=""),
        right("evalsha", "EVALSHA", _UNKNOWN_SHA, 1, head),
        right("eval", "EVAL", "return 1", 1, head),
        right("get", "GET", receipt),
        right("set", "SET", receipt, "", "PX", 1, harmless=("SET", receipt, "", "XX", "PX", 1)),
        # A field without a value: refused, but not for a lack of rights.
        right("hset", "HSET", head, "epoch", "", harmless=("HSET", nowhere, "a", "b", "c")),
        right("xadd", "XADD", log, "*", "f", "", harmless=("XADD", nowhere, "NOMKSTREAM", "*", "f", "")),
        right("del", "DEL", log, harmless=("DEL", nowhere)),
        # A message on the namespace's channel would empty caches: where rights are tried, a private channel is used.
        right(
            f"{sharded}publish".lower(),
            f"{sharded}PUBLISH",
            channel,
            "",
            harmless=(f"{sharded}PUBLISH", names.echo_prefix + me, ""),
            reach=f"&{channel}",
        ),
        right("hmget", "HMGET", head, "epoch"),
        right("xrevrange", "XREVRANGE", log, "+", "-", "COUNT", 1),
    ]


def _of_answering(names: Names, sharded: str, me: str) -> list[Right]:
    """Return the rights that a replica needs to receive questions, and to answer and confirm."""

    def right(command: str, channel: str, *message: Argument) -> Right:
        run = (sharded + command, channel, *message)
        return Right("replica", (sharded + command).lower(), run, run, f"&{channel}", is_for_answers=True)

    return [
        right("SUBSCRIBE", names.question),
        # A message without reports and answers.
        right("PUBLISH", names.confirmed, encode_reports(me)),
    ]


def _of_asking(names: Names, sharded: str, me: str) -> list[Right]:
    """Return the rights that a publisher needs to read the registry, to query replicas, and to receive answers."""
    private_channel = names.echo_prefix + me

    def right(command: str, *arguments: Argument, harmless: tuple[Argument, ...] = (), reach: str) -> Right:
        run = (command, *arguments)
        return Right("publisher", command.lower(), run, harmless or run, reach, is_for_answers=True)

    return [
        right("TIME", reach=""),
        right("ZRANGEBYSCORE", names.registry, 0, 0, reach=_reach_of(names)),
        right("MGET", f"{names.presence_prefix}{me}", reach=_reach_of(names)),
        right(f"{sharded}SUBSCRIBE", names.confirmed, reach=f"&{names.confirmed}"),
        right(
            f"{sharded}PUBLISH",
            names.question,
            "",
            harmless=(f"{sharded}PUBLISH", private_channel, ""),
            reach=f"&{names.question}",
        ),
    ]


async def missing_of(link: Link, rights: Sequence[Right]) -> list[Right]:
    """Return those of `rights` that this user lacks. Nothing is written, and no replica notices. Raises: LinkLost.

    On a server before Redis 7, or if this user may not run scripts, commands without effect are tried instead. These do
    not show whether a publisher may use its channels, unless a replica's rights are checked as well.
    """
    arguments = [each for right in rights for each in (len(right.command), *right.command)]
    try:
        numbers = await link.call("EVAL", _CHECK_SCRIPT, 0, *arguments)
    except Refused:
        numbers = None
    if numbers is not None:
        return [rights[number - 1] for number in numbers]
    return [right for right in rights if await _is_refused(link, right)]


async def _is_refused(link: Link, right: Right) -> bool:
    name, *arguments = right.harmless
    try:
        # Subscriptions are confirmed by pushes, not replies, so they go through the link's own methods.
        if right.name.endswith("unsubscribe"):
            await link.unsubscribe(*map(str, arguments))
        elif right.name.endswith("subscribe"):
            await link.subscribe(*map(str, arguments))
            with suppress(Refused):
                await link.unsubscribe(*map(str, arguments))
        else:
            await link.call(name, *arguments)
    except Refused as refusal:
        is_tried_elsewhere = right.role == "publisher" and right.harmless[1:2] != right.command[1:2]
        # The server has one code for all rights: only its text says that the channel is the reason.
        return refusal.code == "NOPERM" and not (is_tried_elsewhere and "channel" in str(refusal))
    return False


def _reach_of(names: Names) -> str:
    return f"~{{{names.channel}}}:*"
