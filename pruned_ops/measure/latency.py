"""LatencyTable: how long attention with n heads, and an FFN of width w, take on a machine for one batch of a
workload.

A table is measured once (`layer_times`), kept as a file, and refused where it does not hold: on another
machine, with other versions, for another model. Time is not proportional to width (a layer without heads
still normalises, narrow matrices use the processor worse), so a table says what pruning gains where
parameters and MACs do not.
"""

from __future__ import annotations

import math
import shlex
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pruned_ops.files import read_json, write_json
from pruned_ops.layers.kinds import BERT_KIND, StackKind
from pruned_ops.layers.modules import PrunedEncoder
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.measure.timing import Workload, machine, versions
from pruned_ops.models.families.known import family_of
from pruned_ops.ops.registry import backends_of
from pruned_ops.shape import MAX_WIDTH, LayerShape, ModelShape, checked_int

Points = tuple[tuple[int, float], ...]

FORMAT = 1
# An alignment this near to the best one is as good, because medians of a few rounds differ by as much.
ALIGN_TOLERANCE = 1.02
_MACHINE = ("processor", "cores", "threads", "cpu_capability", "accelerator", "device")
_VERSIONS = ("torch", "pruned-ops")
_WORKLOAD_OPTIONS = (
    "--data", "--length", "--batch-size", "--batches", "--max-length", "--stride", "--skip-bad", "--rounds"
)  # fmt: skip


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds per batch of `workload`, for one layer's attention and FFN part at measured sizes.

    base_ms: the time outside the layer parts: packing, embedding, unpacking, the question-answering head.
    attention, ffn: (num_heads, ms) and (ffn_width, ms), sizes rising from 0 to the dense one, ms never
    falling. alignment: (align, relative cost of FFN widths that are odd multiples of it); 1.0 is the best.
    backends: op -> the backend that ran it. command: the command line that made the table, where one did.
    family: what people call the family of the model, such as BERT; tables of earlier versions do not say it.
    Errors: ValueError that names the field for any other value.
    """

    hidden_size: int
    head_dim: int
    hidden_act: str
    dtype: str
    workload: Workload
    base_ms: float
    attention: Points
    ffn: Points
    alignment: Points
    machine: dict[str, Any]
    versions: dict[str, Any]
    backends: dict[str, Any]
    command: str | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "head_dim"):
            checked_int(name, getattr(self, name), 1, MAX_WIDTH)
        kinds = {"str": str, "dict[str, Any]": dict, "str | None": str | None}
        for field in fields(self):
            if not isinstance(getattr(self, field.name), kinds.get(str(field.type), object)):
                raise ValueError(f"{field.name} is {getattr(self, field.name)!r}")
        _check_number("base_ms", self.base_ms)
        for name in ("attention", "ffn", "alignment"):
            _check_points(name, getattr(self, name))

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; the file is there whole, or as it was before."""
        write_json(Path(path), {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """The table in a file that `save` wrote. Errors: OSError where there is no file to read; ValueError
        that names the file and its fault for any other file."""
        data = read_json(Path(path), "latency table")
        try:
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise ValueError(f'an object with "format": {FORMAT} is needed')
            wrong = ({field.name for field in fields(cls)} ^ set(data)) - {"family"}
            if wrong:
                raise ValueError(f"missing or unknown: {', '.join(sorted(wrong))}")
            data["workload"] = _parse_workload(data["workload"])
            points = {name: _parse_points(name, data[name]) for name in ("attention", "ffn", "alignment")}
            return cls(**{**data, **points})
        except ValueError as error:
            raise ValueError(f"{path} is no latency table: {error}") from error

    def attention_ms(self, num_heads: int) -> float:
        """Milliseconds per batch of one layer's attention part; ValueError as `part_ms`."""
        return _interpolate("num_heads", self.attention, num_heads)

    def ffn_ms(self, ffn_width: int) -> float:
        """Milliseconds per batch of one layer's FFN part; ValueError as `part_ms`."""
        return _interpolate("ffn_width", self.ffn, ffn_width)

    def part_ms(self, layer: LayerShape) -> float:
        """Milliseconds per batch of one layer of this shape, piecewise linear between the measured points.

        ValueError beyond the sizes that were measured."""
        return self.attention_ms(layer.num_heads) + self.ffn_ms(layer.ffn_width)

    def predict(self, layers: Sequence[LayerShape]) -> float:
        """Milliseconds per batch of a whole model with these layers; ValueError as `part_ms`."""
        return self.base_ms + sum(self.part_ms(layer) for layer in layers)

    @property
    def align(self) -> int:
        """The smallest alignment of FFN widths within 2% of the best."""
        return min(align for align, cost in self.alignment if cost <= ALIGN_TOLERANCE)

    def refuse(
        self, shape: ModelShape, config: Any, dtype: str = "float32", device: str = "cpu"
    ) -> str | None:
        """Why this table does not hold for a model of this shape and config here and now: a sentence that
        names all that differs, or None where the table holds. Errors: ValueError for a config of no known
        family."""
        family = family_of(config)
        hidden_act = family.value(config, "hidden_act")
        heads = max((layer.num_heads for layer in shape.layers), default=0)
        width = max((layer.ffn_width for layer in shape.layers), default=0)
        here = {**machine(device), "device": device}
        pairs = [(name, self.machine.get(name), here[name]) for name in _MACHINE]
        pairs += [(name, self.versions.get(name), versions()[name]) for name in _VERSIONS]
        pairs += [("family", self.family, family.name), ("dtype", self.dtype, dtype)]
        pairs += [("hidden_size", self.hidden_size, shape.hidden_size)]
        pairs += [("head_dim", self.head_dim, shape.head_dim), ("hidden_act", self.hidden_act, hidden_act)]
        for name, points, needed in (("num_heads", self.attention, heads), ("ffn_width", self.ffn, width)):
            if needed > points[-1][0]:
                pairs.append((f"{name} up to", points[-1][0], needed))
        if all(recorded == needed for _, recorded, needed in pairs):  # else the layer may not even run here
            widest = LayerShape(heads, width)
            sizes = shape.hidden_size, shape.head_dim, widest
            ran = layer_backends(*sizes, hidden_act, device, family.kind(config))
            pairs += [(f"{op} on backend", self.backends.get(op), backend) for op, backend in ran.items()]
        differences = [f"{n} {a or 'none'}, here is {b or 'none'}" for n, a, b in pairs if a != b]
        return f"it was made with {'; with '.join(differences)}" if differences else None

    def remake_command(
        self,
        path: str | Path,
        model: str | Path,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int | None = None,
    ) -> str:
        """The command that replaces the file at `path` by a table for this model as it is run here, of the
        workload that this table is of. SQUAD.json stands in it for a file that the table does not name."""
        command = ["pruned-ops", "latency-table", str(path), "--model", str(model), *self._workload_options()]
        command += [] if dtype == "float32" else ["--dtype", dtype]
        command += ["--device", device]
        command += [] if threads is None else ["--threads", str(threads)]
        return shlex.join([*command, "--overwrite"])

    def _workload_options(self) -> list[str]:
        """The options of `pruned-ops latency-table` that make this workload: those of the command that the
        table was made by, else those that its lengths say."""
        options = _workload_options(self.command or "")
        if "--data" in options or "--length" in options:
            return options
        lengths = {length for batch in self.workload.batches for length in batch}
        sizes = {len(batch) for batch in self.workload.batches}
        options = ["--length", str(*lengths)] if len(lengths) == 1 else ["--data", "SQUAD.json"]
        options += ["--batch-size", str(*sizes)] if len(sizes) == 1 else []
        return [*options, "--batches", str(len(self.workload.batches))]


def _workload_options(command: str) -> list[str]:
    """Those of a command's options, with their values, that say what is timed and how often; an option may be
    cut short there, as argparse allows."""
    try:
        words = iter(shlex.split(command))
    except ValueError:  # no line of a shell
        return []
    kept = []
    for word in words:
        name, equals, value = word.partition("=")
        options = [option for option in _WORKLOAD_OPTIONS if len(name) > 2 and option.startswith(name)]
        if len(options) == 1:
            has_value = options[0] != "--skip-bad"
            kept += [options[0], *([value if equals else next(words, "")] if has_value else [])]
    return kept


def _interpolate(name: str, points: Points, size: int) -> float:
    """The milliseconds at this size: exact at a measured point, else on the line between two."""
    if not 0 <= size <= points[-1][0]:
        raise ValueError(f"{name} is {size}; the table reaches from 0 to {points[-1][0]}")
    i = bisect_left(points, size, key=lambda point: point[0])
    high, high_ms = points[i]
    if high == size:
        return high_ms
    low, low_ms = points[i - 1]
    return low_ms + (high_ms - low_ms) * (size - low) / (high - low)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; a number that is finite and not negative is needed")


def _check_points(name: str, points: Points) -> None:
    """ValueError unless sizes rise; a curve begins at 0 and never falls; the least alignment cost is 1."""
    for size, value in points:
        checked_int(f"a size in {name}", size, 0, MAX_WIDTH)
        _check_number(f"{name} at {size}", value)
    sizes, values = [size for size, _ in points], [value for _, value in points]
    if not sizes or sizes != sorted(set(sizes)):
        raise ValueError(f"the sizes in {name} do not rise: {sizes}")
    if name == "alignment" and (sizes[0] < 1 or min(values) != 1):
        raise ValueError("alignment needs aligns from 1 on, and 1.0 as its least cost")
    if name != "alignment" and (sizes[0] != 0 or values != sorted(values)):
        raise ValueError(f"{name} must begin at size 0, and its times must never fall")


def _parse_points(name: str, value: object) -> Points:
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise ValueError(f"{name} is no list of pairs")
    return tuple((size, number) for size, number in value)


def _parse_workload(value: object) -> Workload:
    if not isinstance(value, dict) or set(value) != {"name", "batches"} or not isinstance(value["name"], str):
        raise ValueError("workload needs exactly a name and batches")
    batches = value["batches"]
    if not isinstance(batches, list) or not all(isinstance(batch, list) for batch in batches):
        raise ValueError("the workload's batches are no lists of lengths")
    name = "a length in workload"
    return Workload(
        value["name"], tuple(tuple(checked_int(name, n, 0, MAX_WIDTH) for n in b) for b in batches)
    )


def layer_backends(
    hidden_size: int,
    head_dim: int,
    shape: LayerShape,
    hidden_act: str,
    device: torch.device | str,
    kind: StackKind = BERT_KIND,
) -> dict[str, str]:
    """The backend that runs each op of a layer of this shape and kind here: one token is run through such a
    layer."""
    model_shape = ModelShape((shape,), hidden_size, head_dim)
    with torch.random.fork_rng(devices=[]):
        encoder = PrunedEncoder(model_shape, hidden_act=hidden_act, kind=kind).to(device)
    encoder.pack()
    batch = PackedBatch.from_mask(None, 1, 1, torch.device(device))
    x = torch.zeros(1, hidden_size, device=device)
    positions = torch.zeros(1, dtype=torch.int32, device=device)
    return backends_of(lambda: encoder(x, batch, positions=positions))
