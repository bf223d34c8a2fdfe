"""The parameters that the API reads from the URLs of requests."""

from typing import Annotated, ClassVar

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from ....shared.invalidation import DEFAULT_NAMESPACE, KEY_BYTES_MAX, NAMESPACE_PATTERN

__all__ = ["EventsQuery", "HistoryQuery", "NamespacesQuery", "ReplicaId", "ReplicasQuery"]

# The pattern is for the OpenAPI document; `check_namespace` checks it, with a better error text.
_Namespace = Annotated[str, Field(json_schema_extra={"pattern": f"^{NAMESPACE_PATTERN}$"})]


class HistoryQuery(BaseModel):
    """The query parameters of GET /invalidations. A misspelt parameter is an error."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    namespace: _Namespace = Field(DEFAULT_NAMESPACE, description="The namespace whose log is read.")
    limit: int = Field(100, ge=1, le=1_000, description="The maximum number of invalidations in a page.")
    before: int | None = Field(
        None, ge=1, lt=2**64, description="Only invalidations with a lower sequence: the previous page's `next_before`."
    )
    key: str | None = Field(
        None,
        min_length=1,
        max_length=KEY_BYTES_MAX,
        description="Only invalidations that match this key: by the key itself, by a prefix, or by everything. "
        "Invalidations by tag are left out: only replicas know which entries have a tag.",
    )
    since: str | None = Field(
        None,
        max_length=100,
        description="Only invalidations sent since then: a time with an offset, or an age in seconds or as 15m, 2h, "
        "1d. Times are those of the publishers' clocks: for people, never for order.",
        examples=["15m", "2025-06-30T12:00:00Z"],
    )


class EventsQuery(BaseModel):
    """The query parameters of GET /events."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    namespace: _Namespace = Field(DEFAULT_NAMESPACE, description="The namespace to follow.")
    last_event_id: str | None = Field(
        None,
        max_length=100,
        description="Continue after the event with this id. The header Last-Event-ID takes precedence.",
    )


class ReplicasQuery(BaseModel):
    """The query parameters of GET /replicas."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    namespace: _Namespace = Field(DEFAULT_NAMESPACE, description="The namespace that the replicas follow.")


class NamespacesQuery(BaseModel):
    """The query parameters of GET /namespaces."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1_000, description="The maximum number of namespaces in a page.")
    after: Annotated[str, Field(json_schema_extra={"pattern": f"^({NAMESPACE_PATTERN})?$"})] = Field(
        "", description="Only namespaces whose names come after this one: the previous page's `next_after`."
    )


ReplicaId = Annotated[str, Path(min_length=1, max_length=512, description="The id of the replica.", examples=["web-2"])]
