"""What was measured of servers, as a page for readers: a column for each server, a line for each phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from presentation import counted, table

Row = dict[str, Any]


def page(rows: Sequence[Row]) -> str:
    """The rows of bench_serve.py."""
    servers = list(dict.fromkeys(row["server"] for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        name, cell = _cell(row)
        lines.setdefault(name, {})[row["server"]] = cell
    cells = [[name, *(by_server.get(server, "") for server in servers)] for name, by_server in lines.items()]
    return "\n".join(
        [
            "# Servers of one embedder over loopback",
            "",
            f"{counted(rows[0]['texts_per_request'], 'text')} a request, "
            f"{counted(rows[0]['machine_threads'], 'thread')}. Clients and servers share the cores; one "
            "server is asked at a time.",
            "",
            *table(["phase", *servers], cells),
        ]
    )


def _cell(row: Row) -> tuple[str, str]:
    """What a line is called, and what this row has in it."""
    phase = row["phase"]
    if phase == "bare":
        return "the model alone, texts/s", f"{row['texts_per_s']:.0f}"
    if phase == "start":
        return "first answer after the start, s", f"{row['seconds']:.1f}"
    if phase == "closed":
        name = f"{counted(row['clients'], 'client')}, texts/s (p50, p99 in ms; CPU ms a request)"
        cpu = f"; {row['cpu_ms']:.1f}" if row.get("cpu_ms") else ""
        return name, f"{row['texts_per_s']:.0f} ({row['ms_p50']:.0f}, {row['ms_p99']:.0f}{cpu})"
    if phase == "overload":
        name = "overload: answered + refused + lost (p99 in ms)"
        return name, f"{row['answered']} + {row['refused']} + {row['lost']} ({row['ms_p99']:.0f})"
    if phase == "memory":
        name = "MB after the first second, and after the last (minutes)"
        if not row.get("mb_first"):  # a rival's, whose process is not known
            return name, ""
        return name, f"{row['mb_first']:.0f}, {row['mb_last']:.0f} ({row['seconds'] / 60:.0f})"
    return f"{phase} of its best rate: p50, p99 in ms", f"{row['ms_p50']:.0f}, {row['ms_p99']:.0f}"
