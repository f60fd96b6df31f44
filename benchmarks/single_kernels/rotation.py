"""How a kernel alone is timed on cold memory: the call is repeated on so many sets of inputs and outputs that
L2 holds none of them when it comes round again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

# Bytes of an H200's L2; smaller ones are emptied all the more.
L2 = 60 << 20
# Sets of inputs, at most. A case that moves little is timed with a cache that holds some of them: making and
# capturing more sets would take longer than timing.
MOST_SETS = 64


def input_sets(nbytes: float) -> int:
    """How many sets of inputs and outputs of so many bytes are larger than three times L2; MOST_SETS at
    most."""
    return min(MOST_SETS, 1 + int(3 * L2 / nbytes))


def rotated(
    make: Callable[[], Sequence[Any]], call: Callable[..., Any], sets: int
) -> list[Callable[[], Any]]:
    """The call on each of so many sets of inputs."""
    return [partial(call, *make()) for _ in range(sets)]
