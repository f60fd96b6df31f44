"""Device functions that the kernels share: a tile of a matrix product and its place, GELU, cosine and sine,
LayerNorm."""

from __future__ import annotations

import triton
import triton.language as tl

from pruned_ops.ops.backends.triton.launch import INTERPRETING as _INTERPRETING

INTERPRETING = tl.constexpr(_INTERPRETING)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """accumulator + a b, summed in fp32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The row and column of a tile. GROUP_M rows of tiles are walked together, so that their operands stay in
    L2."""
    group = GROUP_M * tiles_n
    first = tile // group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    return first + tile % group % height, tile % group // height


@triton.jit
def matrix_tile(
    x, weight, row, column, tokens, width, begin, end, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    PAIRED: tl.constexpr = False,
):  # fmt: skip
    """The tile of x weight^T that begins at (row, column), summed over the columns from begin to end: fp32
    (BLOCK_M, BLOCK_N).

    x (tokens, k) and weight (width, k) are pointers to rows, or descriptors (TMA). What lies beyond tokens
    and width is undefined (the last row again, or zeros), and the caller does not store it.
    PAIRED: weight (2 * width, k) has the rows i and width + i for unit i. The tile begins at a unit, and the
    products of its two rows lie side by side: without TMA, which reads consecutive rows.
    """
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for k in range(begin, end, BLOCK_K):
            a = x.load([row, k])
            b = weight.load([column, k]).T
            accumulator = product(a, b, accumulator, PRECISION, UPCAST)
    else:
        ms = tl.minimum(row + tl.arange(0, BLOCK_M), tokens - 1).to(tl.int64)
        if PAIRED:
            unit = tl.minimum(column + tl.arange(0, BLOCK_N) // 2, width - 1)
            ns = (unit + tl.arange(0, BLOCK_N) % 2 * width).to(tl.int64)
        else:
            ns = tl.minimum(column + tl.arange(0, BLOCK_N), width - 1).to(tl.int64)
        ks = tl.arange(0, BLOCK_K)
        a_pointers = x + ms[:, None] * stride_x + begin + ks[None, :]
        b_pointers = weight + ns[None, :] * stride_w + begin + ks[:, None]
        for k in range(begin, end, BLOCK_K):
            if WHOLE_K:
                a, b = tl.load(a_pointers), tl.load(b_pointers)
            else:
                inside = k + ks < end
                a = tl.load(a_pointers, mask=inside[None, :], other=0.0)
                b = tl.load(b_pointers, mask=inside[:, None], other=0.0)
            accumulator = product(a, b, accumulator, PRECISION, UPCAST)
            a_pointers += BLOCK_K
            b_pointers += BLOCK_K
    return accumulator


@triton.jit
def reciprocal(x):
    """1 / x to 1 ulp; fp32. One instruction: Triton's division takes care of huge divisors, with several."""
    if INTERPRETING:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def gelu(x):
    """GELU, x Phi(x), in fp32: relu(x) - |x| / 2 erfc(|x| / sqrt 2).

    erfc is from Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: a polynomial in t times
    exp(-x^2 / 2). The largest error is 3.3e-7; `erf` takes twice as many instructions and more registers.
    From 16 on, the power is 0, and an infinity has its limit.
    """
    size = tl.minimum(tl.abs(x), 16.0, propagate_nan=tl.PropagateNan.ALL)
    t = reciprocal(1.0 + 0.23164189 * size)
    series = 0.5307027 * t - 0.7265760
    series = series * t + 0.7107069
    series = series * t - 0.1422484
    series = series * t + 0.1274148
    scaled = 0.84932180 * size  # sqrt(log2(e) / 2)
    return tl.maximum(x, 0.0) - size * tl.exp2(-scaled * scaled) * (series * t)


@triton.jit
def cos_sin(angle):
    """Cosine and sine in fp32, to 2e-7 for angles up to 12,000 and to 4e-6 up to 100,000.

    The nearest quarter turn is taken off in parts of few bits, so that their multiples are exact (Cody and
    Waite 1980); what is left goes into polynomials through Chebyshev's points. CUDA's own functions take
    care of any angle, with branches and, by Triton 3.6, a table in local memory.
    """
    quarters = tl.floor(angle * 0.63661977 + 0.5)
    rest = angle - quarters * 1.5703125  # 201 / 2^7
    rest -= quarters * 0.000483751296997  # 2029 / 2^22
    rest -= quarters * 7.54978995e-8
    square = rest * rest
    sin = (0.0083327483 - 0.00019587891 * square) * square - 0.16666665
    sin = rest + rest * square * sin
    cos = (2.4547942e-5 * square - 0.0013888303) * square + 0.041666665
    cos = 1.0 - 0.5 * square + square * square * cos
    quarter = quarters.to(tl.int32)
    swapped = quarter % 2 != 0
    turned_cos, turned_sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    turned_cos = tl.where((quarter + 1) & 2 != 0, -turned_cos, turned_cos)
    return turned_cos, tl.where(quarter & 2 != 0, -turned_sin, turned_sin)


@triton.jit
def normalised(x, inside, hidden, weight, bias, eps):
    """LayerNorm of x (rows, BLOCK) over its first `hidden` columns: fp32, two passes over registers.

    All is computed of the differences from the row's first number, which LayerNorm does not depend on: they
    are small where the row has a large mean, and 0 where it is constant, so that no rounding of the mean is
    taken for variance."""
    first = tl.arange(0, x.shape[1]) == 0
    x -= tl.sum(tl.where(first[None, :], x, 0.0), 1)[:, None]
    mean = tl.sum(tl.where(inside, x, 0.0), 1) / hidden
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / hidden
    return centred * (1.0 / tl.sqrt(variance + eps))[:, None] * weight[None, :] + bias[None, :]
