"""The configurations of every kernel, as data. All of them are compiled and tested, and tuning.py chooses.

The reasons for them: tiles of 64 and 128 query rows suit lengths of 64 to 512 tokens (192 would waste a third
at 128). wgmma needs 64 rows and 4 warps. Three or four stages of 64 columns in fp16 fill most of the 227 KiB
of shared memory that a program can have on sm_90; the smaller configurations fit sm_80's 163 KiB. None spills
registers on either, under Triton 3.6 and 3.9.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Bytes of shared memory that a program can have.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
# The largest hidden size whose rows fit a program of the fused GEMM + LayerNorm.
MAX_FUSED_HIDDEN = 1024


@dataclass(frozen=True)
class GemmConfig:
    """A tile of block_m tokens by block_n outputs, block_k columns at a time.

    group_m: how many rows of tiles are walked together. split_k: over how many programs the inner dimension
    of a tile is split. programs: how many of linear_gelu's a multiprocessor of sm_90 holds at once; with two,
    one multiplies while the other activates. persistent: as many programs run as the GPU holds at once, and
    each takes tile after tile.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    split_k: int = 1
    programs: int = 1
    persistent: bool = False
    tma: bool = False

    def shared_bytes(self, itemsize: int) -> int:
        """The shared memory that the stages of the operands take."""
        return self.stages * (self.block_m + self.block_n) * self.block_k * itemsize


@dataclass(frozen=True)
class AttentionConfig:
    """A program of block_m query rows that reads block_n keys at a time.

    sequences: how many whole short sequences share a program; 0 means that the sequences are long.
    programs: how many of them a multiprocessor of sm_90 holds at once.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    sequences: int = 0
    programs: int = 1


@dataclass(frozen=True)
class RowConfig:
    """The number of rows that a program of the LayerNorm kernels owns, and its warps."""

    rows: int
    warps: int


_HALF = (
    GemmConfig(128, 128, 64, 8, 3, programs=2),
    GemmConfig(128, 64, 64, 4, 4, programs=2),
    GemmConfig(64, 128, 64, 4, 4, programs=2),
    GemmConfig(64, 64, 64, 4, 4, programs=3),
    GemmConfig(64, 32, 64, 4, 4, programs=4),
    GemmConfig(32, 64, 64, 4, 4, programs=4),
    GemmConfig(16, 64, 128, 4, 3, programs=3),
)
_SPLIT = tuple(
    replace(config, split_k=split)
    for config in (GemmConfig(64, 64, 64, 4, 4), GemmConfig(16, 64, 128, 4, 3))
    for split in (2, 4)
)
_SINGLE = (
    GemmConfig(128, 64, 32, 8, 3),
    GemmConfig(64, 64, 32, 4, 3),
    GemmConfig(32, 64, 32, 4, 3),
    GemmConfig(16, 32, 32, 4, 3),
)
# Item size -> configurations. Those that wgmma can run also come with TMA, and the largest persistent. Of
# 128 x 256 outputs a multiprocessor holds one program, which loads its next tile while it activates.
LINEAR_GELU: dict[int, tuple[GemmConfig, ...]] = {
    2: (
        *_HALF,
        *(replace(config, tma=True) for config in _HALF[:5]),
        replace(_HALF[0], persistent=True),
        replace(_HALF[0], tma=True, persistent=True),
        GemmConfig(128, 256, 64, 8, 3, tma=True, persistent=True),
        *_SPLIT,
    ),
    4: (*_SINGLE, replace(_SINGLE[0], persistent=True), replace(_SINGLE[1], split_k=2)),
}
# Those whose operands are read through pointers: a descriptor cannot read a unit's two rows one after the
# other. Their block_n counts rows of weights.
LINEAR_GEGLU: dict[int, tuple[GemmConfig, ...]] = {
    size: tuple(config for config in known if not config.tma and not config.persistent)
    for size, known in LINEAR_GELU.items()
}
# Item size -> the largest block_n, which is the next power of 2 of the hidden size -> configurations for it.
FUSED_NORM: dict[int, dict[int, tuple[GemmConfig, ...]]] = {
    2: {
        256: (GemmConfig(64, 256, 64, 8, 3), GemmConfig(32, 256, 64, 4, 3), GemmConfig(16, 256, 64, 4, 3)),
        512: (GemmConfig(32, 512, 64, 8, 2), GemmConfig(16, 512, 64, 4, 2)),
        1024: (GemmConfig(16, 1024, 32, 8, 2),),
    },
    4: {
        256: (GemmConfig(32, 256, 32, 8, 2), GemmConfig(16, 256, 32, 4, 2)),
        512: (GemmConfig(16, 512, 32, 8, 2),),
        1024: (GemmConfig(16, 1024, 16, 8, 2),),
    },
}
# Item size -> head_dim -> configurations.
ATTENTION: dict[int, dict[int, tuple[AttentionConfig, ...]]] = {
    2: {
        16: (AttentionConfig(64, 64, 4, 2, programs=5), AttentionConfig(128, 64, 4, 2, programs=3)),
        32: (
            AttentionConfig(64, 64, 4, 3, programs=5),
            AttentionConfig(128, 64, 4, 3, programs=3),
            AttentionConfig(128, 128, 8, 2),
        ),
        64: (
            AttentionConfig(64, 64, 4, 3, programs=4),
            AttentionConfig(128, 64, 8, 3, programs=2),
            AttentionConfig(128, 128, 8, 2),
        ),
        128: (AttentionConfig(64, 32, 8, 2, programs=2), AttentionConfig(128, 64, 8, 2)),
    },
    4: {
        16: (AttentionConfig(64, 32, 4, 2),),
        32: (AttentionConfig(32, 32, 4, 2),),
        64: (AttentionConfig(32, 16, 8, 2),),
        128: (AttentionConfig(32, 16, 8, 2),),
    },
}
# Item size -> head_dim -> the configuration with a window, or a bias by position. Positions and biases take
# registers of their own: with 32 keys at a time a multiprocessor holds as many programs as without them.
BY_POSITION: dict[int, dict[int, AttentionConfig]] = {
    2: {
        16: AttentionConfig(64, 32, 4, 3, programs=5),
        32: AttentionConfig(64, 32, 4, 3, programs=5),
        64: AttentionConfig(64, 32, 4, 3, programs=4),
        128: AttentionConfig(64, 32, 8, 3, programs=2),
    },
    4: {
        **{head_dim: known[0] for head_dim, known in ATTENTION[4].items()},
        128: AttentionConfig(16, 32, 8, 2),  # 32 rows spill with a bias, by Triton 3.6 for sm_90
    },
}
# Item size -> segment length -> the configuration in which several whole sequences share a program. It has 64
# rows in fp16, and 32 in fp32, whose exact products use no tensor cores and keep their operands in registers.
SHORT: dict[int, dict[int, AttentionConfig]] = {
    2: {16: AttentionConfig(64, 64, 4, 1, sequences=4), 32: AttentionConfig(64, 64, 8, 1, sequences=2)},
    4: {16: AttentionConfig(32, 32, 8, 1, sequences=2)},
}
# A row of one warp needs no barrier, and with one row per program a multiprocessor has the most loads under
# way. Wider rows take more warps, for the registers.
ROWS = (RowConfig(1, 1), RowConfig(1, 2), RowConfig(1, 4), RowConfig(1, 8), RowConfig(4, 4))
# Numbers of a row that a thread keeps at most: more spill, beside the three vectors.
MOST_NUMBERS = 32


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def attention_config(max_seqlen: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """The configuration by the lengths alone, with which short sequences share a program.

    Among the others, what counts most is how many warps a multiprocessor holds: while one program waits for
    its products, the others compute their softmax. Then, how few rows lie beyond the longest sequence. Last,
    how tall a tile is, because it reads the keys once."""
    short = short_config(max_seqlen, head_dim, dtype)
    if short is not None:
        return short

    def worth(config: AttentionConfig) -> tuple[int, int, int]:
        rows = -(-max_seqlen // config.block_m) * config.block_m
        return config.programs * config.warps, -rows, config.block_m

    return max(ATTENTION[dtype.itemsize][head_dim], key=worth)


def short_config(max_seqlen: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig | None:
    """The configuration in which sequences of at most this length share a program; None if they are long."""
    segment = max(next_power_of_2(max_seqlen), 16)
    takes = dtype.itemsize == 2 or head_dim <= 32
    return SHORT[dtype.itemsize].get(segment) if takes else None


def by_position_config(max_seqlen: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """The configuration with a window or a bias by position."""
    return short_config(max_seqlen, head_dim, dtype) or BY_POSITION[dtype.itemsize][head_dim]


def row_configs(hidden: int) -> list[RowConfig]:
    """The configurations of the LayerNorm kernels for rows of this size, the most promising first."""
    block = next_power_of_2(hidden)
    return [config for config in ROWS if config.rows * block <= MOST_NUMBERS * 32 * config.warps]
