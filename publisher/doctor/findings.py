"""Findings: what was found, how severe it is, why it matters and what to do."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

__all__ = ["SEVERITIES", "Check", "Finding", "Severity", "worst_of"]

Severity: TypeAlias = Literal["ok", "info", "warning", "problem"]
"""`problem`: something does not work, or will not when it is needed. `warning`: it works, but costs more than necessary
when something else fails. `info`: worth knowing, nothing to do."""

SEVERITIES: Final[tuple[Severity, ...]] = ("ok", "info", "warning", "problem")
"""From the mildest to the worst."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Shape:  `check` is its name, e.g. `eviction`; `subject` is the server, namespace or service. `what` was found, `why`
            it matters, and the `remedy`, which is empty if nothing has to be done. `measured` holds the numbers behind
            it, each name with its unit last.
    """

    check: str
    subject: str
    severity: Severity
    what: str
    why: str
    remedy: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """One check of one subject, and why it matters: makes the findings."""

    name: str
    subject: str
    why: str

    def ok(self, what: str, **measured: float) -> Finding:
        """Find that all is well."""
        return Finding(self.name, self.subject, "ok", what, self.why, "", measured)

    def info(self, what: str, remedy: str = "", **measured: float) -> Finding:
        """Find something worth knowing."""
        return Finding(self.name, self.subject, "info", what, self.why, remedy, measured)

    def warning(self, what: str, remedy: str, **measured: float) -> Finding:
        """Find something that costs more than necessary."""
        return Finding(self.name, self.subject, "warning", what, self.why, remedy, measured)

    def problem(self, what: str, remedy: str, **measured: float) -> Finding:
        """Find something that does not work."""
        return Finding(self.name, self.subject, "problem", what, self.why, remedy, measured)


def worst_of(findings: Iterable[Finding]) -> Severity:
    """Return the worst severity among the findings; `ok` for no findings."""
    return SEVERITIES[max((SEVERITIES.index(finding.severity) for finding in findings), default=0)]
