"""`python -m benchmarks.chart REPORT.json… FILE.svg`: draw hits, latency and fleet of reports of `--json`.

One bar for each row whose benchmark is drawn: ours ÷ peer, on a logarithmic axis, beside the peer at 1 and the target.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

__all__ = ["drawn"]

_SHOWN: Final = ("hit", "publish → ", "one message")
_WIDTH: Final = 900
_LABELS_WIDTH: Final = 460
_ROW_HEIGHT: Final = 24
_TOP: Final = 46
_LEAST: Final = 0.25
_MOST: Final = 4.0
_STYLE: Final = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.dim{fill:#59636e}.ours{fill:#2f6feb}.more{fill:#1a7f37}"
    ".line{stroke:#8c959f}.target{stroke:#bc4c00;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.dim{fill:#9198a1}}"
)


def drawn(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the chart of these rows as SVG. Rows of other benchmarks are left out."""
    shown = [row for row in rows if row["what"].startswith(_SHOWN)]
    height = _TOP + _ROW_HEIGHT * len(shown) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img">',
        "<title>broadcache beside its peers</title>",
        f"<style>{_STYLE}</style>",
        '<text x="8" y="18">ours ÷ peer. Blue: less is better. Green: more is better. Orange: the target.</text>',
    ]
    for mark in (0.25, 0.5, 1, 2, 4):
        x = _x_of(mark)
        parts.append(f'<line class="line" x1="{x}" x2="{x}" y1="{_TOP - 6}" y2="{height - 8}"/>')
        parts.append(f'<text class="dim" x="{x}" y="{_TOP - 10}" text-anchor="middle">{mark:g}</text>')
    for number, row in enumerate(shown):
        parts += _bar(row, _TOP + _ROW_HEIGHT * number)
    return "\n".join([*parts, "</svg>", ""])


def _bar(row: Mapping[str, Any], y: int) -> list[str]:
    one, end = _x_of(1), _x_of(row["ratio"])
    label = escape(f"{row['what']} ÷ {row['peer_name']}")
    kind = "more" if row["unit"] == "/s" else "ours"
    left, width = min(one, end), abs(end - one)
    bar = [
        f'<text x="8" y="{y + 16}">{label}</text>',
        f'<rect class="{kind}" x="{left}" y="{y + 4}" width="{max(1, width)}" height="{_ROW_HEIGHT - 8}"/>',
        f'<text class="dim" x="{max(one, end) + 6}" y="{y + 16}">{row["ratio"]:.2f}</text>',
    ]
    if (limit := row["limit"]) is not None and limit["of"] == "ratio":
        x = _x_of(limit["bound"])
        bar.append(f'<line class="target" x1="{x}" x2="{x}" y1="{y + 2}" y2="{y + _ROW_HEIGHT - 2}"/>')
    return bar


def _x_of(ratio: float) -> int:
    share = math.log(min(max(ratio, _LEAST), _MOST) / _LEAST) / math.log(_MOST / _LEAST)
    return round(_LABELS_WIDTH + share * (_WIDTH - _LABELS_WIDTH - 60))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chart", description="Draw a report of --json.")
    parser.add_argument("report", type=Path, nargs="+", help="files that `--json` has written")
    parser.add_argument("svg", type=Path, help="the file to write")
    arguments = parser.parse_args()
    rows = [row for report in arguments.report for row in json.loads(report.read_text())["rows"]]
    arguments.svg.write_text(drawn(rows))


if __name__ == "__main__":
    main()
