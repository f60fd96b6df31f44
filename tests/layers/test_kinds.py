"""Stacks that differ from BERT's, as modules: laid out for one call, and layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from by_position import with_gaps
from inputs import READY, cu_seqlens, randn
from pruned_ops import LayerShape, ModelShape, PrunedEncoder
from pruned_ops.layers.kinds import ByPosition, Disentangled, StackKind
from pruned_ops.layers.weights import AlignedWeights, PanelWeights
from pruned_ops.ops.backends.cpu import bf16_capability
from pruned_ops.ops.registry import record, use_backend

LENGTHS = (9, 0, 40, 1)
SHAPE = ModelShape((LayerShape(3, 24), LayerShape(0, 17), LayerShape(1, 0), LayerShape(2, 40)), 48, 16)
MODERN = StackKind(
    norm_first=True,
    first_norm=False,
    final_norm=True,
    gated=True,
    attention_bias=False,
    ffn_bias=False,
    norm_bias=False,
    by_position=tuple(ByPosition(1e4 if i % 2 else 16e4, 5 if i % 2 else None) for i in range(4)),
)
KINDS = {
    "modern": MODERN,
    "biased": StackKind(norm_first=True, final_norm=True, gated=True, by_position=MODERN.by_position),
    "mpnet": StackKind(bias_reach=6),
    "deberta": StackKind(disentangled=Disentangled(True, True, 8, 16)),
    "gated": StackKind(gated=True),
    "first": StackKind(norm_first=True),
}
needs_extension = pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")


def stack(kind: StackKind, hidden_act: str = "gelu") -> Any:
    torch.manual_seed(0)
    made: Any = PrunedEncoder(SHAPE, 1e-5, hidden_act, kind).requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(0.0, 0.3)
    return made.eval()


def by_definition(model: Any, x: Tensor, positions: Tensor) -> Tensor:
    """The same layers, one sequence at a time, from torch's functions alone."""
    kind: StackKind = model.kind
    outputs = []
    for rows, place in zip(x.split(list(LENGTHS)), positions.long().split(list(LENGTHS)), strict=True):
        for i, layer in enumerate(model.layers):
            for part in (layer.attention, layer.ffn):
                before = part.norm if kind.norm_first and part.norm is not None else torch.nn.Identity()
                inner = part.linears[0](before(rows))
                if part is layer.attention:
                    inner = _context(inner, model.layers[i].attention, place)
                elif kind.gated:
                    inner = F.gelu(inner.tensor_split(2, -1)[0]) * inner.tensor_split(2, -1)[1]
                else:
                    inner = F.gelu(inner)
                rows = rows + part.linears[1](inner)
                rows = rows if kind.norm_first else part.norm(rows)
        outputs.append(rows if model.final_norm is None else model.final_norm(rows))
    return torch.cat(outputs)


def _context(qkv: Tensor, attention: Any, place: Tensor) -> Tensor:
    if not qkv.numel():
        return qkv.new_zeros(len(qkv), qkv.size(1) // 3)
    query, key, value = qkv.view(len(qkv), 3, -1, 16).permute(1, 2, 0, 3)
    base, window = attention.by_position.rotary_base, attention.by_position.window
    if base is not None:
        turn = torch.outer(place.float(), 1.0 / base ** (torch.arange(0, 16, 2).float() / 16))
        turn = torch.polar(torch.ones_like(turn), turn)
        query, key = (torch.complex(*each.contiguous().chunk(2, -1)) * turn for each in (query, key))
        query, key = (torch.cat([each.real, each.imag], -1) for each in (query, key))
    away = place[None, :] - place[:, None]
    mask = torch.zeros(away.shape) if window is None else torch.where(away.abs() <= window, 0.0, -torch.inf)
    if attention.position_bias is not None:
        reach = attention.position_bias.size(1) // 2
        mask = mask + attention.position_bias[:, away.clamp(-reach, reach) + reach]
    if attention.kind.disentangled is not None:
        row = attention.kind.disentangled.distance_rows.long()[away.clamp(-16, 16) + 16]
        added = torch.einsum("hqd,hqkd->hqk", query, attention.position_key[:, row])
        added = added + torch.einsum("hkd,hqkd->hqk", key, attention.position_query[:, row])
        query, mask = query / 3**0.5, mask + added / (3 * 16) ** 0.5
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(0, 1).flatten(1)


def arguments() -> tuple[Any, ...]:
    return randn(1, sum(LENGTHS), 48), cu_seqlens(LENGTHS), max(LENGTHS)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that weights get on a GPU."""
    monkeypatch.setattr(AlignedWeights, "refuse", staticmethod(lambda parts: None))
    monkeypatch.setattr(PanelWeights, "refuse", staticmethod(lambda parts: "not now"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how", ["one call", "layer by layer", "op by op", "reference", "aligned", "aligned layer by layer"]
)
def test_every_kind_is_its_definition(how: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, positions = stack(KINDS[kind]), arguments(), with_gaps(LENGTHS)
    expected = by_definition(model, x[0], positions)
    if "aligned" in how:
        as_on_a_gpu(monkeypatch)
    if how != "op by op":
        model.pack()
    given = x[0].clone()
    collect: list[Tensor] | None = [] if "layer by layer" in how else None
    backend = "reference" if how == "reference" else None
    with record() as ran, use_backend(backend) if backend else torch.no_grad():
        found = model.run(*x, collect, positions)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(x[0], given)
    if "aligned" in how:
        assert [layer.ffn_width for layer in model.running_shape.layers] == [32, 32, 0, 48]
        assert "encoder" not in ran
    if how == "one call" and "cpu" in READY:
        assert ran == {"encoder": {"cpu": 1}}
    if collect is not None:
        assert len(collect) == 4 and torch.equal(collect[-1], found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layout", [pytest.param("panels", marks=needs_extension), "aligned, with filled-up widths"]
)
def test_released_weights_come_back(layout: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the panels, in which the rows of a gated FFN lie in another order."""
    if layout != "panels":
        as_on_a_gpu(monkeypatch)
    model = stack(KINDS[kind])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.pack(keep_weights=False)
    assert model.layers[0].ffn.up.weight.isnan().all()
    model.unpack()
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@needs_extension
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_weights_of_every_kind(kind: str, dtype: str) -> None:
    if dtype == "bfloat16" and bf16_capability() is None:
        pytest.skip("this processor has no AVX512_BF16")
    model, x, positions = stack(KINDS[kind]), arguments(), with_gaps(LENGTHS)
    exact = model.run(*x, None, positions)
    model.pack(int8=model.linear_names if dtype == "int8" else (), bfloat16=dtype == "bfloat16")
    found = model.run(*x, None, positions)
    assert not torch.equal(found, exact)
    least = 0.999 if dtype == "int8" else 0.9999
    assert F.cosine_similarity(found, exact, dim=1).mean() > least


def test_frequencies_stay_exact_where_weights_are_cast() -> None:
    model = stack(MODERN)
    exact = model.layers[0].attention.rotary.clone()
    rotary = model.half().layers[0].attention.rotary
    assert rotary.dtype == torch.float32 and torch.equal(rotary, exact)
    assert not any("rotary" in name for name in model.state_dict())


def test_other_activations_run_layer_by_layer() -> None:
    model, x = stack(MODERN, "silu"), arguments()
    model.pack()
    with record() as ran:
        found = model.run(*x)
    assert "encoder" not in ran and "linear_geglu" not in ran
    gated = model.layers[0].ffn
    gate, up = gated.up(gated.norm(x[0])).chunk(2, -1)
    torch.testing.assert_close(gated(x[0]), x[0] + gated.down(F.silu(gate) * up))
    assert found.isfinite().all()


def test_kinds_that_are_not_computed_are_refused() -> None:
    with pytest.raises(ValueError, match="LayerNorms come last are computed with all biases"):
        PrunedEncoder(SHAPE, kind=StackKind(ffn_bias=False))
