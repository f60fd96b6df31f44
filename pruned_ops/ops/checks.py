"""What the references of several ops check of their arguments. Each raises RuntimeError that names the op and
the argument."""

import torch
from torch import Tensor


def check_matrix(op: str, name: str, tensor: Tensor, columns: int | None = None) -> None:
    """A (rows, columns) tensor."""
    torch._check(tensor.dim() == 2, lambda: f"{op}: {name} has {tensor.dim()} dimensions, 2 are needed")
    if columns is not None:
        torch._check(
            tensor.size(1) == columns,
            lambda: f"{op}: {name} has {tensor.size(1)} columns, {columns} are needed",
        )


def check_vector(op: str, name: str, tensor: Tensor, size: int) -> None:
    """A (size,) tensor."""
    torch._check(
        tensor.dim() == 1 and tensor.size(0) == size,
        lambda: f"{op}: {name} has shape {tuple(tensor.shape)}, ({size},) is needed",
    )


def check_ids(op: str, name: str, ids: Tensor) -> None:
    """int32 or int64, of one dimension."""
    torch._check(
        ids.dtype in (torch.int32, torch.int64) and ids.dim() == 1,
        lambda: f"{op}: {name} is {ids.dtype} {tuple(ids.shape)}, int32 or int64 (tokens,) is needed",
    )


def check_positions(op: str, positions: Tensor, tokens: int) -> None:
    """int32 (tokens,)."""
    torch._check(
        positions.dtype == torch.int32,
        lambda: f"{op}: positions is {positions.dtype}, torch.int32 is needed",
    )
    check_vector(op, "positions", positions, tokens)


def check_position_bias(op: str, position_bias: Tensor, num_heads: int) -> None:
    """A row for each head, with as many columns before the middle one as after it."""
    torch._check(
        position_bias.dim() == 2 and position_bias.size(0) == num_heads and position_bias.size(1) % 2 == 1,
        lambda: (
            f"{op}: position_bias has shape {tuple(position_bias.shape)}, ({num_heads}, 2 * reach + 1) is "
            "needed, a row for each head"
        ),
    )


def check_relative(
    op: str,
    rows: list[tuple[str, Tensor | None]],
    distance_rows: Tensor | None,
    shape: tuple[int | None, ...],
) -> None:
    """Some of the tensors by distance, all of one shape, in which None may be any size; and with them, and
    only with them, int32 (2 * reach + 1,)."""
    names = " or ".join(name for name, _ in rows)
    torch._check(
        any(tensor is not None for _, tensor in rows) == (distance_rows is not None),
        lambda: f"{op}: distance_rows goes with {names}, and {names} with it",
    )
    first: tuple[int, ...] | None = None
    for name, tensor in rows:
        if tensor is not None:
            first = tuple(tensor.shape) if first is None else first
            _check_rows(op, name, tensor, first, shape)
    if distance_rows is not None:
        kind, size = distance_rows.dtype, tuple(distance_rows.shape)
        torch._check(
            kind == torch.int32 and len(size) == 1 and size[0] % 2 == 1,
            lambda: f"{op}: distance_rows is {kind} {size}, int32 (2 * reach + 1,) is needed",
        )


def _check_rows(
    op: str, name: str, tensor: Tensor, first: tuple[int, ...], shape: tuple[int | None, ...]
) -> None:
    actual, expected = tuple(tensor.shape), tuple("rows" if size is None else size for size in shape)
    fits = len(actual) == len(shape) and all(
        size is None or size == actual_size for size, actual_size in zip(shape, actual, strict=True)
    )
    torch._check(
        fits and actual == first,
        lambda: f"{op}: {name} has shape {actual}, {expected} is needed, one for all",
    )


def check_distance_rows(op: str, distance_rows: Tensor | None, rows: int) -> None:
    """The values of distance_rows, where there are any, lie in [0, rows) and never fall."""
    if distance_rows is None or distance_rows.numel() == 0:
        return
    lowest, highest = int(distance_rows[0]), int(distance_rows[-1])
    if lowest < 0 or highest >= rows or bool((distance_rows.diff() < 0).any()):
        raise RuntimeError(f"{op}: distance_rows must lie between 0 and {rows - 1}, and never fall")


def check_cu_seqlens(op: str, cu_seqlens: Tensor) -> None:
    """int32 (batch + 1,)."""
    torch._check(
        cu_seqlens.dim() == 1 and cu_seqlens.size(0) > 0 and cu_seqlens.dtype == torch.int32,
        lambda: (
            f"{op}: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, int32 (batch + 1,) is needed"
        ),
    )


def check_bounds(op: str, rows: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """The values of cu_seqlens rise from 0 to the rows in steps of at most max_seqlen."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    if (
        int(cu_seqlens[0]) != 0
        or int(cu_seqlens[-1]) != rows.size(0)
        or (lengths < 0).any()
        or longest > max_seqlen
    ):
        raise RuntimeError(
            f"{op}: cu_seqlens must rise from 0 to the {rows.size(0)} tokens in steps of at most "
            f"max_seqlen = {max_seqlen}; it is {cu_seqlens.tolist()}"
        )


def check_rising(op: str, cu_seqlens: Tensor, positions: Tensor | None) -> None:
    """The values of positions, where there are any, rise from at least 0 within each sequence."""
    if positions is None or positions.numel() == 0:
        return
    begins = torch.zeros(positions.size(0) + 1, dtype=torch.bool, device=positions.device)
    begins[cu_seqlens.long()] = True
    rises = positions.diff() > 0
    if int(positions.min()) < 0 or not bool((rises | begins[1:-1]).all()):
        raise RuntimeError(f"{op}: positions must be at least 0 and rise within each sequence")
