"""What a caller may ask of the pruning: the target, the parts that are pruned, and the ways to choose.

This module imports neither torch nor transformers, so that the command line can show its help at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

# What gates can be put on. Every layer has its own heads and FFN units; all layers share the hidden
# dimensions.
PARTS = ("heads", "ffn", "hidden")
DEFAULT_PARTS = ("heads", "ffn")
# When a gate counts in the budget: only when it is exactly 1, as the paper prints it, or whenever it is not 0
# (Louizos et al. 2018), which has hardly any gradient where gates start.
PENALTIES = ("one", "open")
# The gates of a short training move faster, but at most so many times: beyond that, gates close by the noise
# of a few steps.
MAX_PACE = 3.0
# The ways to score what stays without training gates (`importance.score`).
METHODS = ("gain", "leave-one-out", "random")
# Those of them that need labels, because they score by the loss.
BY_LABELS = ("gain", "leave-one-out")
# The recipes that train no gates: these ways, and the surgeon's (`surgeon.score`).
UNTRAINED = ("fast", *METHODS)
# The windows that they score by, where nothing else is asked for. Leave-one-out passes over them again for
# every head and group.
SCORE_WINDOWS = {"fast": 128, "gain": 1024, "leave-one-out": 128, "random": 0}
# How compaction makes up for what it removes (`compensate.compensate`): in one of the ways that are made, in
# whichever is best for each part, or not at all.
COMPENSATIONS_MADE = ("bias", "least-squares")
COMPENSATIONS = ("auto", *COMPENSATIONS_MADE, "none")
UNITS = ("params", "macs", "speedup", "latency_ms")


@dataclass(frozen=True)
class Target:
    """How small or how fast the pruned model is to be, in one unit.

    params, macs: the fraction to keep of the dense encoder's parameters or multiply-accumulates. speedup: how
    many times as fast as the dense model it is. latency_ms: milliseconds for a batch of the workload.
    Errors: ValueError unless exactly one of them is given, and within its range.
    """

    params: float | None = None
    macs: float | None = None
    speedup: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        given_units = [unit for unit in UNITS if getattr(self, unit) is not None]
        if len(given_units) != 1:
            raise ValueError(
                f"exactly one target of {', '.join(UNITS)} is needed; got {', '.join(given_units) or 'none'}"
            )
        unit, number = given_units[0], getattr(self, given_units[0])
        if isinstance(number, bool) or not isinstance(number, Real):
            raise ValueError(f"target {unit} is {number!r}: a number is needed")
        value = self.value
        object.__setattr__(self, unit, value)  # of Python's own type, which a run's JSON takes
        if unit in ("params", "macs") and not 0 < value < 1:
            raise ValueError(f"target {unit} is {value}: a fraction kept between 0 and 1 is needed")
        if unit == "speedup" and not 1 < value < float("inf"):
            raise ValueError(f"target speedup is {value}: more than 1 is needed")
        if unit == "latency_ms" and not 0 < value < float("inf"):
            raise ValueError(f"target latency_ms is {value}: it must be positive")

    @property
    def unit(self) -> str:
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def value(self) -> float:
        return float(getattr(self, self.unit))

    @property
    def is_time(self) -> bool:
        """Whether measured time decides if the target is met."""
        return self.unit in ("speedup", "latency_ms")

    @property
    def name(self) -> str:
        """The target as a file name, such as "macs-0.5"."""
        return f"{self.unit}-{self.value:g}"

    def __str__(self) -> str:
        return {
            "params": f"{self.value:g} of the parameters",
            "macs": f"{self.value:g} of the multiply-accumulates",
            "speedup": f"{self.value:g}x the dense speed",
            "latency_ms": f"{self.value:g} ms a batch",
        }[self.unit]


def check_parts(parts: Sequence[str]) -> None:
    """ValueError unless these are one or more of PARTS."""
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        raise ValueError(f"parts are {parts!r}: a list of one or more of {', '.join(PARTS)} is needed")
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(
            f"parts are {', '.join(parts) or 'none'}: one or more of {', '.join(PARTS)} is needed"
        )


def compensation_of(recipe: str, asked_for: str | None) -> str:
    """How the narrow model is compensated when it is made: what was asked for, or the recipe's way."""
    return asked_for or ("auto" if recipe == "fast" else "none")


def score_steps(recipe: str, batch_size: int) -> int | None:
    """The minibatches of so many examples that hold a recipe's SCORE_WINDOWS; None where it has none."""
    windows = SCORE_WINDOWS.get(recipe)
    return None if windows is None else -(-windows // batch_size)
