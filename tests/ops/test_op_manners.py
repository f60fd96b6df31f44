"""The ops' manners on every backend: views, threads, what is traced and what is refused, which one runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import pruned_ops
from inputs import (
    INTERPRETED,
    READY,
    arguments_for,
    attention_arguments,
    cu_seqlens,
    randn,
)
from numerics import assert_within_budget
from pruned_ops.ops.registry import OPS, record, use_backend

OP_NAMES = sorted(OPS)
# Every op on every backend that has it; `encoder` is one call where a backend can, and its parts elsewhere.
OP_ON_BACKEND = [
    pytest.param(backend, op, id=f"{backend}-{op}")
    for backend in READY
    for op in OP_NAMES
    if backend == "reference" or backend in OPS[op].kernels
]


def _views(x: Tensor) -> list[Tensor]:
    """The same values at an odd offset, with a row stride, and transposed in memory."""
    offset = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if x.dim() < 2:
        return [offset]
    strided = torch.empty(x.size(0), x.size(1) + 3)[:, 1:-2].copy_(x)
    return [offset, strided, x.t().contiguous().t()]


def few_rows(backend: str, op: str) -> list[Any]:
    """Arguments of an op, with few rows where they are interpreted."""
    return arguments_for(op, tokens=7 if backend in INTERPRETED else 37)


@pytest.mark.parametrize(("backend", "op"), OP_ON_BACKEND)
def test_views(backend: str, op: str) -> None:
    """Offset (4-byte aligned) and non-contiguous inputs give what contiguous ones give."""
    arguments = few_rows(backend, op)
    with use_backend(backend):
        expected = OPS[op](*arguments)
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor) and argument.is_floating_point():
                for view in _views(argument):
                    found = OPS[op](*arguments[:place], view, *arguments[place + 1 :])
                    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("backend", "op"), OP_ON_BACKEND)
def test_inputs_are_left_alone_and_results_repeat(backend: str, op: str) -> None:
    arguments = few_rows(backend, op)
    before = copy.deepcopy(arguments)
    with use_backend(backend):
        first, second = OPS[op](*arguments), OPS[op](*arguments)
    assert torch.equal(first, second)
    for old, new in zip(before, arguments, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads; it is as before after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")
@pytest.mark.parametrize("op", OP_NAMES)
def test_the_number_of_threads(op: str, threads: Callable[[int], None]) -> None:
    """It changes no bit, but of the ops whose product is torch's: those stay within their budget, and repeat.
    With the first sizes MKL is known to split sums."""
    any_number = op not in ("linear_gelu", "linear_geglu", "linear_add_layer_norm")
    for tokens, hidden, width in ((5, 3072, 768), (5, 768, 3072), (130, 90, 56)):
        arguments = arguments_for(op, tokens, hidden, width)
        threads(1)
        with use_backend("cpu"):
            alone = OPS[op](*arguments)
        for count in (2, 3, 8):
            threads(count)
            output = assert_within_budget(OPS[op], "cpu", arguments)
            with use_backend("cpu"):
                assert torch.equal(output, OPS[op](*arguments))
            assert torch.equal(output, alone) or not any_number


@pytest.mark.parametrize(("backend", "op"), OP_ON_BACKEND)
def test_opcheck(backend: str, op: str) -> None:
    with use_backend(backend):
        torch.library.opcheck(OPS[op].overload, tuple(few_rows(backend, op)))


@pytest.mark.parametrize("op", OP_NAMES)
def test_compiles_whole(op: str) -> None:
    arguments = arguments_for(op)
    compiled = torch.compile(lambda *a: OPS[op](*a) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), OPS[op](*arguments) + 1)


@pytest.mark.parametrize("op", OP_NAMES)
def test_a_gradient_is_refused(op: str) -> None:
    arguments: list[Any] = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments_for(op)
    ]
    with pytest.raises(RuntimeError, match=f"{op} is inference-only"):
        OPS[op](*arguments)
    with torch.no_grad():
        OPS[op](*arguments)


@pytest.mark.parametrize("backend", READY)
def test_a_max_seqlen_that_is_no_length_of_the_batch(backend: str) -> None:
    """A huge one costs nothing, and one below 0 is refused, also where there is no sequence."""
    qkv, bounds, longest, head_dim = attention_arguments((5, 9), 2, 16)
    empty, none = qkv[:0], torch.zeros(1, dtype=torch.int32)
    with use_backend(backend):
        expected = OPS["attention"](qkv, bounds, longest, head_dim)
        assert torch.equal(OPS["attention"](qkv, bounds, 2**40, head_dim), expected)
        assert OPS["attention"](empty, none, 2**40, head_dim).shape == (0, 32)
        for arguments in ((qkv, bounds), (empty, none)):
            with pytest.raises(
                RuntimeError, match="max_seqlen is -1, at least 0 is needed|at most max_seqlen = -1"
            ):
                OPS["attention"](*arguments, -1, head_dim)


@pytest.mark.parametrize(
    "backend", [name for name in READY if name in ("reference", *OPS["encoder"].kernels)]
)
def test_an_encoder_with_a_max_seqlen_that_is_no_length_of_the_batch(backend: str) -> None:
    arguments = arguments_for("encoder")
    with use_backend(backend):
        expected = OPS["encoder"](*arguments)
        assert torch.equal(OPS["encoder"](*arguments[:2], 2**40, *arguments[3:]), expected)
        with pytest.raises(RuntimeError, match="max_seqlen"):
            OPS["encoder"](*arguments[:2], -1, *arguments[3:])
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            OPS["encoder"](arguments[0], arguments[1] + 1, *arguments[2:])


@pytest.mark.parametrize("op", OP_NAMES)
def test_a_forward_mode_derivative_is_refused(op: str) -> None:
    """torch itself computes these under no_grad, too."""
    arguments = arguments_for(op)
    expected = OPS[op](*arguments)
    place = next(i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.is_floating_point())
    tangent = torch.ones_like(arguments[place])

    def run(value: Tensor) -> Tensor:
        return OPS[op](*arguments[:place], value, *arguments[place + 1 :])

    message = f"{op} is inference-only and was asked for a forward-mode derivative"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[place], tangent)
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            run(dual)
        assert torch.equal(run(arguments[place]), expected)  # nothing is asked of this one
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(run, (arguments[place],), (tangent,))


@pytest.mark.parametrize("backend", READY)
def test_bad_shapes_are_refused(backend: str) -> None:
    qkv, bounds, longest, head_dim = attention_arguments((5, 3), 2, 16)
    norm = [torch.ones(90), torch.zeros(90), 1e-12]
    with use_backend(backend):
        for bad in (
            (qkv, bounds, longest, 15),
            (qkv, bounds.long(), longest, 16),
            (qkv[0], bounds, longest, 16),
        ):
            with pytest.raises(RuntimeError, match="attention"):
                pruned_ops.ops.attention(*bad)
        with pytest.raises(RuntimeError, match="add_layer_norm"):
            pruned_ops.ops.add_layer_norm(randn(0, 4, 90), randn(1, 89), randn(2, 4, 90), *norm)
        with pytest.raises(RuntimeError, match="add_layer_norm"):
            pruned_ops.ops.add_layer_norm(randn(0, 4, 90), None, randn(2, 5, 90), *norm)
        with pytest.raises(RuntimeError):
            pruned_ops.ops.linear_gelu(randn(0, 4, 90), randn(1, 8, 91), randn(2, 8))
        embedding = arguments_for("embed_layer_norm", 8)
        # 8 rows of 8 ids have a row for each position. Floats may have the dtype of the tables.
        for ids in (embedding[0].expand(8, 8), embedding[0][0], embedding[0].float()):
            with pytest.raises(RuntimeError, match="embed_layer_norm: input_ids (is|has)"):
                pruned_ops.ops.embed_layer_norm(ids, *embedding[1:])
    with pytest.raises(RuntimeError, match="linear_geglu: weight has 7 rows, two for each unit"):
        pruned_ops.ops.linear_geglu(randn(0, 4, 90), randn(1, 7, 90), randn(2, 7))


@pytest.mark.parametrize("backend", READY)
def test_shapes_are_looked_at_before_values(backend: str) -> None:
    """So that the error names the argument, and not an index or a number that its values do not have."""
    qkv, bounds, *sizes = attention_arguments((5, 3), 2, 16)
    stack, embedding = arguments_for("encoder", 8), arguments_for("embed_layer_norm", 8)
    with use_backend(backend):
        for bad in (bounds[:0], bounds[0], bounds[None], bounds.long()):
            with pytest.raises(RuntimeError, match="attention: cu_seqlens (is|has)"):
                pruned_ops.ops.attention(qkv, bad, *sizes)
            if backend in ("reference", *OPS["encoder"].kernels):
                with pytest.raises(RuntimeError, match="encoder: cu_seqlens (is|has)"):
                    pruned_ops.ops.encoder(stack[0], bad, *stack[2:])
        embedding[3] = embedding[3][0, 0]
        with pytest.raises(RuntimeError, match="embed_layer_norm: word has 0 dimensions"):
            pruned_ops.ops.embed_layer_norm(*embedding)


def checking(backend: str) -> AbstractContextManager[None]:
    """GPU backends look at values only where they are told to."""
    return pruned_ops.debug() if backend == "triton" else nullcontext()


@pytest.mark.parametrize(
    ("bounds", "longest"), [([0, 5], 5), ([1, 5, 8], 8), ([0, 9, 8], 9), ([0, 5, 7], 5), ([0, 3, 8], 4)]
)
@pytest.mark.parametrize("backend", READY)
def test_bad_cu_seqlens_are_refused(backend: str, bounds: list[int], longest: int) -> None:
    qkv = attention_arguments((5, 3), 2, 16)[0]
    with use_backend(backend), checking(backend), pytest.raises(RuntimeError, match="cu_seqlens|max_seqlen"):
        pruned_ops.ops.attention(qkv, torch.tensor(bounds, dtype=torch.int32), longest, 16)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("value", [-1, 10_000])
@pytest.mark.parametrize("backend", READY)
def test_ids_outside_their_table_are_refused(backend: str, value: int, place: int) -> None:
    arguments = arguments_for("embed_layer_norm")
    arguments[place][3] = value
    name = ("input_ids", "position_ids", "token_type_ids")[place]
    with use_backend(backend), checking(backend), pytest.raises(IndexError, match=f"{name}.*{value}"):
        pruned_ops.ops.embed_layer_norm(*arguments)


@pytest.mark.parametrize("place", [3, 4, 5])
@pytest.mark.parametrize("backend", READY)
def test_a_table_without_rows_is_refused(backend: str, place: int) -> None:
    """No id can be clamped into it."""
    arguments = arguments_for("embed_layer_norm", 5)
    arguments[place] = arguments[place][:0]
    with use_backend(backend), pytest.raises((IndexError, RuntimeError), match="0 rows|has no row"):
        pruned_ops.ops.embed_layer_norm(*arguments)
    with use_backend(backend):
        nothing = [ids[:0] for ids in arguments[:3]]
        assert pruned_ops.ops.embed_layer_norm(*nothing, *arguments[3:]).shape == (0, 90)


def test_no_preference_runs_the_first_willing_backend() -> None:
    arguments = arguments_for("add_layer_norm")
    with record() as ran:
        pruned_ops.ops.add_layer_norm(*arguments)
        halves = [a.half() if isinstance(a, Tensor) else a for a in arguments]
        pruned_ops.ops.add_layer_norm(*halves)  # the cpu kernels take fp32: the reference runs, and it shows
    expected = {"cpu": 1, "reference": 1} if "cpu" in READY else {"reference": 2}
    assert ran["add_layer_norm"] == expected


@pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")
def test_a_backend_asked_for_runs_or_raises() -> None:
    halves = [a.half() if isinstance(a, Tensor) else a for a in arguments_for("add_layer_norm")]
    with (
        use_backend("cpu"),
        pytest.raises(pruned_ops.BackendError, match="float16, the kernel takes torch.float32"),
    ):
        pruned_ops.ops.add_layer_norm(*halves)
    with pytest.raises(pruned_ops.BackendError, match="there is no backend 'warp'.*cpu"), use_backend("warp"):
        pass


@pytest.mark.parametrize("backend", READY)
def test_debug_checks_values_and_names_the_op(backend: str) -> None:
    """Also on backends that clamp wrong values otherwise."""
    attention = attention_arguments((40,), 1, 32)
    attention[1] = cu_seqlens((20, 30))
    embedding = arguments_for("embed_layer_norm")
    embedding[0] = embedding[0] + 10_000
    with use_backend(backend), pruned_ops.debug():
        pruned_ops.ops.attention(*attention_arguments((40,), 1, 32))
        with pytest.raises(RuntimeError, match="attention: cu_seqlens must rise"):
            pruned_ops.ops.attention(*attention)
        with pytest.raises(IndexError, match="embed_layer_norm: input_ids holds"):
            pruned_ops.ops.embed_layer_norm(*embedding)
        with pytest.raises(RuntimeError, match=f"linear_gelu on {backend}"):
            pruned_ops.ops.linear_gelu(*arguments_for("linear_gelu")[:2], torch.zeros(3))
