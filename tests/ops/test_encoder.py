"""The whole stack of parts in one call, against its reference."""

from __future__ import annotations

import pytest
import torch

import pruned_ops
from inputs import READY, arguments_for, cu_seqlens, randn
from numerics import assert_within_budget
from pruned_ops.ops.panels import PART_TENSORS, is_attention
from pruned_ops.ops.registry import OPS, use_backend

needs_extension = pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")


@needs_extension
@pytest.mark.parametrize("width", [0, 16, 56, 200])
@pytest.mark.parametrize("hidden", [1, 16, 90, 384])
def test_encoder(hidden: int, width: int) -> None:
    """In one call: heads, no heads, an FFN, none; rows around the sizes of blocks and chunks."""
    for tokens in (0, 1, 7, 16, 37, 193, 230):
        assert_within_budget(OPS["encoder"], "cpu", arguments_for("encoder", tokens, hidden, width))


@needs_extension
@pytest.mark.parametrize("depth", [127, 128, 129, 257, 386])
def test_encoder_multiplies_deep_weights(depth: int) -> None:
    """Depths around the blocks that products take of them, with rows around those of a call."""
    for rows, width in ((1, 130), (47, 129), (48, 300), (49, 17), (97, 257)):
        x, bounds, longest, weights, widths, *rest = arguments_for("encoder", rows, depth, width)
        ffn = len(widths) - 1
        assert not is_attention(widths[ffn])
        alone = [x, bounds, longest, weights[PART_TENSORS * ffn :], widths[ffn:], *rest]
        assert_within_budget(OPS["encoder"], "cpu", alone)


@needs_extension
@pytest.mark.parametrize("lengths", [(1500, 0, 1, 700), (0, 1030, 0), (400,) * 7, (3,) * 500])
def test_encoder_in_groups(lengths: tuple[int, ...]) -> None:
    """More tokens than go through at once, cut between sequences."""
    arguments = arguments_for("encoder", 1, 32, 48)
    arguments[:3] = [randn(0, sum(lengths), 32), cu_seqlens(lengths), max(lengths)]
    assert_within_budget(OPS["encoder"], "cpu", arguments)


@needs_extension
def test_encoder_rows_do_not_depend_on_each_other() -> None:
    """A sequence alone, and with any number of threads, gives the same bits."""
    x, _, _, weights, *rest = arguments_for("encoder", 200)
    threads = torch.get_num_threads()
    with use_backend("cpu"):
        whole = OPS["encoder"](x, cu_seqlens((50, 150)), 150, weights, *rest)
        alone = OPS["encoder"](x[50:], cu_seqlens((150,)), 150, weights, *rest)
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            again = OPS["encoder"](x, cu_seqlens((50, 150)), 150, weights, *rest)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(whole[50:], alone) and torch.equal(whole, again)


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu") if name in READY])
def test_encoder_refuses_by_name(backend: str) -> None:
    good = arguments_for("encoder")
    for place, bad, named in (
        (3, good[3][:-1], "weights has 29 tensors"),
        (3, [good[3][0][:, :-1], *good[3][1:]], "first weight has shape"),
        (3, [*good[3][:3], good[3][3][:-1], *good[3][4:]], "second bias has shape"),
        (4, [*good[4][:1], -2, *good[4][2:]], "first"),
        (0, good[0][0], "x has 1 dimensions"),
    ):
        with use_backend(backend), pytest.raises(RuntimeError, match=f"encoder: {named}"):
            pruned_ops.ops.encoder(*good[:place], bad, *good[place + 1 :])
