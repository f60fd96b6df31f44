"""What every benchmark shares: interleaved timing (pruned_ops.measure) written as self-contained CSV rows.

A row names its machine, versions, workload and runner; nothing is left to the file's name or to memory.
"""

from __future__ import annotations

import csv
import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruned_ops.measure import Timing, machine, versions

RESULTS = Path(__file__).parent / "results"


def rows(
    timings: Mapping[str, Timing], first_rival: str, extra: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One row a runner: milliseconds per batch, sequences and real tokens per second, ratio to `first_rival`.

    speedup_vs_rival is the median over rounds of (rival's seconds / this runner's), from the same rounds.
    """
    there = machine()
    found = versions()
    made = []
    for name, timing in timings.items():
        workload = timing.workload
        made.append(
            {
                "workload": workload.name,
                "runner": name,
                "sequences": workload.sequences,
                "real_tokens": workload.tokens,
                **{f"ms_p{p}": round(timing.ms(p), 3) for p in (20, 50, 80)},
                "sequences_per_s": round(timing.sequences_per_s, 2),
                "tokens_per_s": round(timing.sequences_per_s * workload.tokens / workload.sequences, 1),
                "rival": first_rival,
                "speedup_vs_rival": round(timing.speedup_over(timings[first_rival]), 3),
                "rounds": len(timing.seconds),
                **extra.get(name, {}),
                "date": datetime.date.today().isoformat(),
                **{f"machine_{key}": value for key, value in there.items()},
                **{f"version_{key}": value for key, value in found.items()},
            }
        )
    return made


def result_path(benchmark: str) -> Path:
    """results/BENCHMARK-MACHINE.csv: one file per kind of machine."""
    there = machine()
    kind = re.sub(r"[^a-z0-9]+", "-", str(there["accelerator"] or there["processor"]).lower()).strip("-")
    return RESULTS / f"{benchmark}-{kind}-{there['threads']}t.csv"


def write(path: Path, made: list[dict[str, Any]]) -> None:
    """Write the rows, with one header; an earlier file of the same machine is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in made for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(made)
