"""Measuring a latency table: which sizes, which layer parts, and the curves through their times."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pruned_ops.layers.kinds import StackKind
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.layers.parts import PrunedAttention, PrunedFFN
from pruned_ops.layers.weights import AlignedWeights, PanelWeights
from pruned_ops.measure.graph_timing import GraphClock, HostClock
from pruned_ops.measure.latency import LatencyTable, Points
from pruned_ops.measure.timing import Runner, Workload, current_device, machine, spread, versions
from pruned_ops.models.configuration import PRUNED_CONFIGS, PrunedConfig
from pruned_ops.models.heads import pruned_class
from pruned_ops.models.inputs import default_position_ids, padding_id
from pruned_ops.ops.panels import GROUP, LEVELS, PAIR, PANEL, gated_out
from pruned_ops.ops.registry import backends_of
from pruned_ops.runtime.cuda_graphs import CudaGraphs
from pruned_ops.runtime.optimize import optimize
from pruned_ops.shape import LayerShape, checked_int

# The modules of a chain. They hold as many weights as a small encoder, which so come from memory as its do.
CHAIN = 6
TIMED_BATCHES = 4
# Batches are left out until all rounds take at most so long, which a small encoder on two cores does with all
# of them: more rounds of one batch say more than fewer of four.
MOST_SECONDS = 90.0
ALIGNMENTS = (8, 16, 32, 64, 128)
_LINE = 64  # bytes; where allocations begin, and so every matrix


def measure_table(
    config: Any,
    workload: Workload,
    rounds: int = 5,
    device: torch.device | str = "cpu",
    progress: bool = True,
    command: str | None = None,
    clock: HostClock | GraphClock | None = None,
    dtype: str | None = None,
) -> LatencyTable:
    """Measure this machine on a mean batch of `workload`, up to the sizes of a config.

    dtype: of the linears, as `optimize` takes it: None for fp32, "bfloat16", "int8".
    config: an encoder's, stock or pruned (then sizes go up to its widest layer). Each part is timed
    as a chain of up to 6 distinct modules over packed batches. At most 4 batches are timed, evenly spread
    over the workload's in order of their tokens, and as few as one where all rounds of more would take longer
    than MOST_SECONDS; their times are scaled by tokens to its mean batch. Every
    round sees every size, in an order shuffled each time; medians over rounds are kept. Isotonic regression
    makes the curves rise: noise must never make a wider part cheaper (a pruner would be paid for it), and a
    running maximum would keep one slow measurement.
    On a GPU a chain is a CUDA graph, as in an optimised model, and the GPU's clock times it; the model with
    empty layers is timed as a call, with what the host does before its graph. clock: for tests.
    Errors: ValueError for another model, no round, an empty batch, sequences longer than the model takes, a
    dtype that cannot run here, or another one than int8 for a checkpoint whose weights are stored in int8.
    """
    checked_int("rounds", rounds, 1)
    if dtype != "int8" and getattr(config, "quantization_config", None):
        raise ValueError("this model's weights are stored in int8, and it runs in int8: dtype int8 is needed")
    chosen = chosen_batches(workload)
    empty, dense = empty_config(config)
    longest = max(map(max, workload.batches))
    default_position_ids(empty, None, 1, longest, torch.device("cpu"))  # refuses lengths beyond its table
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had run here
        runners = part_runners(empty, dense, device, dtype)
    inputs = part_inputs(empty, chosen, device)
    densest = ("base", f"attention {dense.num_heads}", f"ffn {dense.ffn_width}")  # what `refuse` compares
    backends = backends_of(lambda: [runners[name](inputs[0]) for name in densest])
    clock = clock or default_clock(torch.device(device))
    with current_device(torch.device(device)):  # whose streams the clock's events are recorded on
        # This turn is not counted: what is done once (threads, buffers, the clock's rise) is over after it.
        first = time_parts(runners, inputs[:1], 1, progress=False, clock=clock)
        seconds = sum(milliseconds for name, milliseconds in first.items() if name != "base") / 1000
        kept = spread(len(inputs), affordable(chosen, seconds, rounds))
        chosen = Workload(chosen.name, tuple(chosen.batches[i] for i in kept))
        ms = time_parts(runners, [inputs[i] for i in kept], rounds, progress, clock)
    # To the workload's mean batch.
    scale = workload.mean_tokens / chosen.mean_tokens
    base, attention, ffn, alignment = _curves(
        empty, dense, {name: milliseconds * scale for name, milliseconds in ms.items()}
    )
    return LatencyTable(
        hidden_size=empty.hidden_size,
        head_dim=empty.head_dim,
        hidden_act=empty.family.value(empty, "hidden_act"),
        dtype=dtype or "float32",
        workload=workload,
        base_ms=base,
        attention=attention,
        ffn=ffn,
        alignment=alignment,
        machine={**machine(device), "device": str(device)},
        versions=versions(),
        backends=backends,
        command=command,
        family=empty.family.name,
    )


def _curves(empty: Any, dense: LayerShape, ms: Mapping[str, float]) -> tuple[float, Points, Points, Points]:
    """base_ms, attention, ffn and alignment of the table, out of the runners' times."""
    part = {name: milliseconds / chain_length(empty) for name, milliseconds in ms.items()}
    attention = _rising([(n, part[f"attention {n}"]) for n in head_counts(dense.num_heads)])
    ffn = _rising([(w, part[f"ffn {w}"]) for w in ffn_widths(dense.ffn_width)])
    empty_layers = empty.num_hidden_layers * (attention[0][1] + ffn[0][1])
    return max(0.0, ms["base"] - empty_layers), attention, ffn, _alignment(ffn, part)


def _alignment(ffn: Points, ms: Mapping[str, float]) -> Points:
    """The relative cost of each alignment: the time of its widths over their time on the straight line
    through the curve. Not on the curve itself, whose points are aligned in different ways."""
    line = [point for point in ffn if 8 * point[0] >= ffn[-1][0]]
    if len(line) < 2:
        return ((ALIGNMENTS[0], 1.0),)
    slope, start = statistics.linear_regression(*zip(*line, strict=True))
    costs = {}
    for align, widths in aligned_widths(ffn[-1][0]).items():
        expected = sum(max(start + slope * width, ffn[0][1]) for width in widths)
        costs[align] = sum(ms[f"ffn {width}"] for width in widths) / expected if widths else 1.0
    return tuple((align, cost / min(costs.values())) for align, cost in costs.items())


def _rising(points: Sequence[tuple[int, float]]) -> Points:
    """The never falling curve nearest to the points: isotonic regression by pooling adjacent violators."""
    pools: list[tuple[float, int]] = []  # the mean of each pool, and how many points it holds
    for _, ms in points:
        pools.append((ms, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (last, n), (before, m) = pools.pop(), pools.pop()
            pools.append(((before * m + last * n) / (m + n), m + n))
    smooth = [mean for mean, count in pools for _ in range(count)]
    return tuple((size, ms) for (size, _), ms in zip(points, smooth, strict=True))


def head_counts(dense: int) -> list[int]:
    """The numbers of heads that are measured: all of them up to 16, else up to 13, with 0, 1 and dense."""
    if dense <= 16:
        return list(range(dense + 1))
    return sorted({0, 1, *(round(dense * i / 11) for i in range(12))})


def ffn_widths(dense: int) -> list[int]:
    """The FFN widths that are measured: 0, dense and about 16 even steps of 64 (of 16 below 512) between."""
    unit = 64 if dense >= 512 else 16
    return sorted({0, dense, *(min(dense, unit * round(dense * i / 16 / unit)) for i in range(1, 16))})


def aligned_widths(dense: int) -> dict[int, list[int]]:
    """The FFN widths that show what an alignment costs: align -> odd multiples of it near 1/4, 1/2 and 3/4 of
    dense. 8 is always there, another align where its multiples come near."""
    widths = {}
    for align in ALIGNMENTS:
        if align == ALIGNMENTS[0] or 8 * align <= dense:
            odd = [2 * round((dense * quarter / 4 / align - 1) / 2) + 1 for quarter in (1, 2, 3)]
            widths[align] = sorted({align * number for number in odd if align * number <= dense})
    return widths


def empty_config(config: Any) -> tuple[PrunedConfig, LayerShape]:
    """The config of the same model with empty layers, and a layer of the most heads and the widest FFN that
    the config has. ValueError for a model that is not of a known family."""
    pruned = PRUNED_CONFIGS.get(getattr(config, "model_type", ""))
    if pruned is None:
        raise ValueError(
            f"a {getattr(config, 'model_type', type(config).__name__)} model is not measured: one of "
            f"{', '.join(PRUNED_CONFIGS)} is needed"
        )
    values = config.to_dict()
    layers = pruned(**values).shape.layers
    heads = max((layer.num_heads for layer in layers), default=0)
    width = max((layer.ffn_width for layer in layers), default=0)
    empty = pruned(**{**values, "layer_shapes": [LayerShape(0, 0)] * len(layers), "head_indices": None})
    return empty, LayerShape(heads, width)


def chain_length(config: Any) -> int:
    """How many parts a chain has: as many as the model has layers, up to CHAIN."""
    return min(CHAIN, max(1, config.num_hidden_layers))


def part_runners(
    empty: Any, dense: LayerShape, device: torch.device | str, dtype: str | None = None
) -> dict[str, Runner]:
    """The runners that are timed: "base", the model with empty layers; "attention N" and "ffn W", chains of
    parts."""
    hidden, head_dim, act = empty.hidden_size, empty.head_dim, empty.family.value(empty, "hidden_act")
    kind = empty.family.kind(empty)
    model = optimize(pruned_class("QuestionAnswering", empty.model_type)(empty).to(device), dtype)
    one_call = model.base_model.packed.encoder.runs_in_one_call
    runners: dict[str, Runner] = {
        "base": lambda batch: model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    }
    # All sizes share one memory, with a row for each module of a chain. Memories of their own would take
    # gigabytes for a large encoder, and each would be colder than weights are in a model that runs often.
    inner = max(4 * dense.num_heads * head_dim, (2 + kind.gated) * dense.ffn_width)
    room = inner * (hidden + 2 * PANEL) + PANEL * (hidden + PANEL) + 2 * _LINE  # enough for any layout
    if kind.disentangled is not None:
        room += 2 * dense.num_heads * head_dim * kind.disentangled.rows + 2 * _LINE
    memory = _weights(chain_length(empty), room, dtype).to(device)
    for n in head_counts(dense.num_heads):
        runners[f"attention {n}"] = _chain(
            partial(_attention, hidden, n, head_dim, kind), memory, kind, head_dim, one_call
        )
    aligned = [width for widths in aligned_widths(dense.ffn_width).values() for width in widths]
    for w in {*ffn_widths(dense.ffn_width), *aligned}:
        runners[f"ffn {w}"] = _chain(partial(_ffn, hidden, w, act, kind), memory, kind, head_dim, one_call)
    return runners


def _attention(hidden: int, num_heads: int, head_dim: int, kind: StackKind, layer: int) -> PrunedAttention:
    return PrunedAttention(hidden, num_heads, head_dim, kind=kind, by_position=kind.of_layer(layer))


def _ffn(hidden: int, width: int, hidden_act: str, kind: StackKind, layer: int) -> PrunedFFN:
    return PrunedFFN(hidden, width, hidden_act=hidden_act, kind=kind)


def _chain(
    make: Callable[[int], PrunedAttention | PrunedFFN],
    memory: Tensor,
    kind: StackKind,
    head_dim: int,
    one_call: bool,
) -> Runner:
    """Run parts one after the other over a packed batch, each with weights from a row of `memory`. make: the
    part of a layer, by its number."""
    chain, rows = [], []
    for number, values in enumerate(memory):
        row = _Row(values)
        with torch.device("meta"):
            part = make(number)
        state = {
            name: row.weight(*parameter.shape)
            if parameter.dim() > 1
            else torch.full(parameter.shape, float(name == "norm.weight"), device=values.device)
            for name, parameter in part.named_parameters()
        }
        part.load_state_dict(state, assign=True)
        chain.append(part.requires_grad_(False).eval())
        rows.append(_Row(values))
    stack: PanelWeights | AlignedWeights | None = None
    if one_call:
        next_row = iter(row for row in rows for _ in range(2))
        gated = {part.linears[0] for part in chain if kind.gated and isinstance(part, PrunedFFN)}

        def lay_out(linear: nn.Linear) -> tuple[Tensor, Tensor]:
            out = gated_out(linear.out_features // 2) if linear in gated else linear.out_features
            return next(next_row).panels(linear.in_features, out)

        stack = PanelWeights(chain, head_dim, lay_out, keep_fp32=False, kind=kind)
    elif AlignedWeights.refuse(chain) is None:
        stack = AlignedWeights(chain)

    def run(batch: dict[str, Tensor]) -> Tensor:
        x, where = batch["x"], (batch["cu_seqlens"], int(batch["max_seqlen"]))
        if stack is not None:
            return stack(x, *where, positions=batch["positions"])
        for part in chain:
            x = part(x, *where, batch["positions"]) if isinstance(part, PrunedAttention) else part(x)
        return x

    return run


def _weights(rows: int, room: int, dtype: str | None) -> Tensor:
    """Random weights in fp32, bfloat16 or int8: (rows, room)."""
    if dtype == "int8":
        return torch.randint(-LEVELS, LEVELS + 1, (rows, room), dtype=torch.int8)
    weights = torch.empty(rows, room).uniform_(-0.05, 0.05)
    return weights.to(torch.bfloat16) if dtype == "bfloat16" else weights


class _Row:
    """A row of memory that hands out matrices one after the other, each from the beginning of a line."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.used = memory, 0

    def weight(self, *shape: int) -> Tensor:
        """A weight as nn.Linear has it. Where the kernels read narrow panels alone, it takes no room."""
        if self.memory.dtype != torch.float32:
            return torch.zeros(1).expand(shape)
        return self._take(*shape)

    def panels(self, inputs: int, out: int) -> tuple[Tensor, Tensor]:
        """The panels of a linear, and its bias, as `ops.encoder` takes them."""
        count, bias = -(-out // PANEL), torch.zeros(out)
        if self.memory.dtype == torch.float32:
            return self._take(count, inputs, PANEL), bias
        if self.memory.dtype == torch.bfloat16:
            return self._take(count, -(-inputs // PAIR), PANEL * PAIR), bias
        panels = self._take(count, 1 + -(-inputs // GROUP), PANEL * GROUP)
        return panels, torch.stack([bias, torch.full_like(bias, 0.05 / LEVELS)])

    def _take(self, *shape: int) -> Tensor:
        size, line = math.prod(shape), _LINE // self.memory.element_size()
        matrix = self.memory[self.used : self.used + size].view(shape)
        self.used += -(-size // line) * line
        return matrix


def chosen_batches(workload: Workload) -> Workload:
    """The workload with at most TIMED_BATCHES of its batches, evenly spread in order of their tokens;
    ValueError for an empty batch."""
    if not workload.batches or not all(map(sum, workload.batches)):
        raise ValueError(f"workload {workload.name} has no batch, or one without tokens")
    return workload.spread(TIMED_BATCHES)


def affordable(chosen: Workload, seconds: float, rounds: int) -> int:
    """How many of these batches, at least one, all rounds can time in MOST_SECONDS, where a round of the
    first one takes so many seconds."""
    mean = seconds * chosen.mean_tokens / sum(chosen.batches[0])
    return max(1, int(min(len(chosen.batches), MOST_SECONDS / (rounds * mean))))


def part_inputs(config: Any, chosen: Workload, device: torch.device | str) -> list[dict[str, Tensor]]:
    """The inputs of each batch: padded ids and mask for the base, and packed rows x (tokens, hidden_size)
    with their positions for the parts."""
    generator = torch.Generator().manual_seed(0)
    batches = chosen.inputs(config.vocab_size, padding_id(config), device)
    for batch in batches:
        mask = batch["attention_mask"]
        packed = PackedBatch.from_mask(mask, mask.size(0), mask.size(1), torch.device(device))
        batch["x"] = torch.randn(packed.tokens, config.hidden_size, generator=generator).to(device)
        batch["positions"] = packed.pack(torch.arange(mask.size(1), device=device).expand(mask.shape)).int()
        batch["cu_seqlens"], batch["max_seqlen"] = packed.cu_seqlens, torch.tensor(packed.max_seqlen)
    return batches


def default_clock(device: torch.device) -> HostClock | GraphClock:
    """The clock that parts are timed by on this device."""
    return GraphClock(["base"], CudaGraphs(device)) if device.type == "cuda" else HostClock()


def time_parts(
    runners: Mapping[str, Runner],
    inputs: Sequence[dict[str, Tensor]],
    rounds: int,
    progress: bool,
    clock: HostClock | GraphClock,
) -> dict[str, float]:
    """The milliseconds of each runner: the mean over the batches of the median over rounds."""
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in inputs] for name in runners}
    order, shuffler = list(runners), random.Random(0)
    turns = [i for _ in range(rounds) for i in range(len(inputs))]
    with torch.inference_mode():
        for i in tqdm(turns, desc="latency table", unit=" batches", disable=not progress):
            shuffler.shuffle(order)  # no runner always finds the caches as the same other one leaves them
            for name in order:
                seconds[name][i].append(clock.seconds(name, runners[name], inputs[i]))
    return {
        name: 1000 * statistics.fmean(map(statistics.median, batches)) for name, batches in seconds.items()
    }
