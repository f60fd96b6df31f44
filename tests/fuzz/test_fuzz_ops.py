"""The ops under attack: any sizes, layouts and numbers, then arguments that no caller should pass. Inputs can
only be read and lie between pages that may not be touched, so that a wild access ends the process."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from by_position import stack_arguments
from fuzzing import NUMBERS, fuzzed, guarded, guarded_all, in_child
from inputs import READY, arguments_for, attention_arguments, cu_seqlens
from int8_cases import in_int8
from numerics import assert_within_budget
from pruned_ops.ops.registry import OPS, use_backend

pytestmark = pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")

OP_NAMES = sorted(OPS)
LENGTHS = st.lists(st.integers(0, 5) | st.sampled_from([15, 16, 17, 47, 48, 49, 70]), max_size=6)
BAD = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38]


@st.composite
def legal_arguments(draw: Any, op: str) -> list[Any]:
    """Arguments of any sizes that the op takes."""
    seed = draw(st.integers(0, 1000))
    if op == "attention":
        head_dim = draw(st.integers(1, 40) | st.sampled_from([64, 65, 128, 200]))
        return attention_arguments(draw(LENGTHS), draw(st.integers(0, 5)), head_dim, seed)
    tokens = draw(st.integers(0, 5) | st.sampled_from([15, 37, 95, 96, 97, 130]))
    # LayerNorm of two or three numbers may blow a rounding up as far as it likes.
    hidden, width = draw(st.just(1) | st.integers(8, 130)), draw(st.integers(0, 130))
    return arguments_for(op, tokens, hidden, width, seed)


def laid_out(draw: Any, arguments: list[Any]) -> list[Any]:
    """The same arguments with rows apart, or with columns first."""
    changed = list(arguments)
    for place, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and argument.dim() == 2 and argument.is_floating_point():
            how = draw(st.sampled_from(["as it is", "as it is", "rows apart", "columns first"]))
            if how == "rows apart":
                before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
                wide = torch.full((argument.size(0), before + argument.size(1) + after), torch.nan)
                changed[place] = wide[:, before : before + argument.size(1)].copy_(argument)
            elif how == "columns first":
                changed[place] = argument.t().contiguous().t()
    return changed


@pytest.mark.parametrize("op", OP_NAMES)
@fuzzed(25, data=st.data())
def test_ops_on_legal_arguments(op: str, data: st.DataObject) -> None:
    """Within the error budget, whatever the sizes and the layouts are."""
    arguments = laid_out(data.draw, data.draw(legal_arguments(op)))
    if op == "attention":
        arguments[0] *= data.draw(st.sampled_from([1.0, 1.0, 1e-20]))
    assert_within_budget(OPS[op], "cpu", guarded_all(arguments, data.draw(st.booleans())))


@fuzzed(25, data=st.data())
def test_stacks_on_legal_arguments(data: st.DataObject) -> None:
    """Stacks other than BERT's, of any sizes: within the error budget in fp32, and in int8 the same bits
    whatever lies beside the arguments."""
    arguments = stack_arguments(
        data.draw(LENGTHS),
        hidden=data.draw(st.integers(8, 100)),
        head_dim=data.draw(st.sampled_from([2, 16, 20, 32])),
        norm_first=data.draw(st.booleans()),
        gated=data.draw(st.booleans()),
        heads=data.draw(st.lists(st.integers(0, 3), max_size=3)),
        width=data.draw(st.integers(0, 70)),
        seed=data.draw(st.integers(0, 1000)),
    )
    at_end = data.draw(st.booleans())
    assert_within_budget(OPS["encoder"], "cpu", guarded_all(arguments, at_end))
    narrow = in_int8(arguments)
    with use_backend("cpu"):
        assert torch.equal(OPS["encoder"](*guarded_all(narrow, at_end)), OPS["encoder"](*narrow))


@pytest.mark.parametrize(
    "op", ["attention", "linear_gelu", "add_layer_norm", "linear_add_layer_norm", "encoder"]
)
@fuzzed(25, data=st.data())
def test_ops_keep_what_is_not_finite_in_its_place(op: str, data: st.DataObject) -> None:
    """NaN, infinities and huge numbers in one sequence, or row, change no bit of the others."""
    arguments = data.draw(legal_arguments(op))
    rows = arguments[0].size(0)
    if not arguments[0].numel():
        return
    if op in ("attention", "encoder"):
        bounds = arguments[1].tolist()
        parts = [range(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
    else:
        parts = [range(row, row + 1) for row in range(rows)]
    bad_part = data.draw(st.sampled_from([part for part in parts if part]))
    x = arguments[0].clone()
    for _ in range(data.draw(st.integers(1, 4))):
        row, column = data.draw(st.sampled_from(bad_part)), data.draw(st.integers(0, x.size(1) - 1))
        x[row, column] = data.draw(st.sampled_from(BAD))
    at_end = data.draw(st.booleans())
    with use_backend("cpu"):
        clean = OPS[op](*guarded_all(arguments, at_end))
        found = OPS[op](*guarded_all([x, *arguments[1:]], at_end))
    kept = torch.ones(rows, dtype=torch.bool)
    kept[list(bad_part)] = False
    assert torch.equal(found[kept], clean[kept])


@st.composite
def hostile_value(draw: Any, value: Any) -> Any:
    """Something else in an argument's place."""
    if isinstance(value, Tensor):
        how = draw(st.sampled_from(["shape", "dtype", "values", "device", "dimension", "none", "empty"]))
        if how == "shape":
            shape = [max(0, size + draw(st.integers(-2, 2))) for size in value.shape]
            return torch.zeros(shape, dtype=value.dtype)
        if how == "dtype":
            return value.to(
                draw(st.sampled_from([torch.float64, torch.float16, torch.int32, torch.int64, torch.bool]))
            )
        if how == "values" and value.numel():
            changed = value.clone()
            number = draw(st.sampled_from([0, -1, 1, 2**31 - 1, -(2**31), 10_000]))
            changed.view(-1)[draw(st.integers(0, value.numel() - 1))] = number
            return changed
        return {
            "device": value.to("meta"), "dimension": value[None], "none": None, "empty": value[:0],
        }.get(how, value)  # fmt: skip
    if isinstance(value, list):
        how = draw(st.sampled_from(["shorter", "longer", "one"]))
        if how == "one" and value:
            place = draw(st.integers(0, len(value) - 1))
            return [*value[:place], draw(hostile_value(value[place])), *value[place + 1 :]]
        return value[:-1] if how == "shorter" else [*value, *value[:1]]
    return draw(st.sampled_from([*NUMBERS, None, "x"]))


@pytest.mark.parametrize("op", OP_NAMES)
@fuzzed(60, data=st.data())
def test_ops_on_hostile_arguments(op: str, data: st.DataObject) -> None:
    """An error, or a result of the reference's shape; never a crash."""
    arguments = data.draw(legal_arguments(op))
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, len(arguments) - 1))
        arguments[place] = data.draw(hostile_value(arguments[place]))
    arguments = guarded_all(arguments, data.draw(st.booleans()))
    try:
        with use_backend("cpu"):
            found = OPS[op](*arguments)
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError, OverflowError) as error:
        assert str(error)
        return
    if op in ("attention", "encoder"):
        arguments[2] = max(0, min(arguments[2], 200))  # the reference pads to max_seqlen
    with use_backend("reference"):
        expected = OPS[op](*arguments)
    assert found.shape == expected.shape and found.dtype == expected.dtype


@fuzzed(
    60,
    bounds=st.lists(st.sampled_from([0, 1, 5, 8, 9, -1, 2**31 - 1, -(2**31)]), max_size=5),
    longest=st.sampled_from([0, 1, 5, 8, 9, -1, 2**40]),
)
def test_attention_on_any_bounds(bounds: list[int], longest: int) -> None:
    """Refused, or a partition of the tokens, whatever cu_seqlens and max_seqlen hold."""
    qkv = attention_arguments((5, 3), 2, 16)[0]
    given = [qkv, torch.tensor(bounds, dtype=torch.int32), longest, 16]
    rises = bounds == sorted(bounds) and bounds[:1] == [0] and bounds[-1:] == [8]
    steps = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    try:
        with use_backend("cpu"):
            OPS["attention"](*guarded_all(given, True))
    except RuntimeError as error:
        assert "cu_seqlens" in str(error) or "max_seqlen" in str(error)
        assert not rises or max(steps) > longest
    else:
        assert rises and max(steps, default=0) <= longest


def test_guarded_memory_is_guarded() -> None:
    """The attack itself: a read past the end, and a write, end the process."""
    tensor = guarded(cu_seqlens((5, 3)))
    assert tensor.tolist() == [0, 5, 8]
    for touch in (
        lambda: ctypes.string_at(tensor.data_ptr(), 16),
        lambda: ctypes.memset(tensor.data_ptr(), 0, 1),
    ):
        with pytest.raises(AssertionError, match="ended by SIG(SEGV|BUS)"):
            in_child(touch)
