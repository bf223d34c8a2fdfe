"""The output of `broadcache doctor`: findings grouped by subject, or one JSON object."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...publisher.doctor.findings import SEVERITIES, Finding, Severity, worst_of
from ...shared.texts import counted
from ..printable import printable

__all__ = ["print_json", "print_text"]

_STYLES: Final[dict[Severity, str]] = {"ok": "green", "info": "cyan", "warning": "yellow", "problem": "bold red"}
_MANY: Final[dict[Severity, str]] = {
    "ok": "ok",
    "info": "for information",
    "warning": "warnings",
    "problem": "problems",
}
_CHECK_WIDTH: Final = len("rights-publisher")
_SEVERITY_WIDTH: Final = max(map(len, SEVERITIES))


def print_json(label: str, findings: Sequence[Finding]) -> None:
    """Print one object.

    Shape:  `worst` is the worst severity found, `counts` the number of findings of each severity.
    """
    counts = _counts(findings)
    print(
        json.dumps(
            {
                "redis": label,
                "worst": worst_of(findings),
                "counts": {severity: counts[severity] for severity in SEVERITIES},
                "findings": [asdict(finding) for finding in findings],
            }
        )
    )


def print_text(label: str, findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print the findings as text, on a terminal in colour and wrapped to its width."""
    console = console or Console(highlight=False)
    for subject, group in groupby(findings, key=lambda finding: finding.subject):
        console.print(Text(printable(subject), "bold"))
        console.print(_table(list(group)))
        console.print()
    console.print(_summary(label, findings))


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True, min_width=_SEVERITY_WIDTH + 2, justify="right")
    table.add_column(no_wrap=True, min_width=_CHECK_WIDTH)
    table.add_column(overflow="fold")
    for finding in findings:
        style = _STYLES[finding.severity]
        table.add_row(Text(finding.severity, style), Text(finding.check, "bold"), Text(printable(finding.what)))
        if finding.severity == "ok":
            continue
        for name, text in (("why", finding.why), ("do", finding.remedy)):
            if text:
                table.add_row(
                    "", Text(name, "dim", justify="right"), Text(printable(text), "dim" if name == "why" else "")
                )
    return table


def _summary(label: str, findings: Sequence[Finding]) -> Text:
    counts = _counts(findings)
    text = Text(f"{printable(label)}: ", "bold")
    for severity in reversed(SEVERITIES):
        if counts[severity]:
            text.append(counted(counts[severity], severity, _MANY[severity]), _STYLES[severity])
            text.append(", ")
    text.right_crop(2)
    return text


def _counts(findings: Sequence[Finding]) -> Counter[Severity]:
    return Counter(finding.severity for finding in findings)
