"""Latency tables: what they say, how they are kept, and where they are refused. No speed is asserted here."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AlbertConfig, BertConfig, RobertaConfig

from family_models import PRUNED_TYPES, stock
from inputs import pruned_model, stock_model
from pruned_ops import LayerShape, ModelShape, record
from pruned_ops.layers.modules import PrunedEncoder
from pruned_ops.layers.weights import PanelWeights
from pruned_ops.measure.graph_timing import HostClock
from pruned_ops.measure.latency import LatencyTable, layer_backends
from pruned_ops.measure.layer_times import (
    _alignment,
    _rising,
    _Row,
    _weights,
    aligned_widths,
    chosen_batches,
    ffn_widths,
    head_counts,
    measure_table,
)
from pruned_ops.measure.timing import Runner, Workload, machine, versions
from pruned_ops.models.int8_checkpoints import METHOD
from pruned_ops.ops.panels import PART_TENSORS
from pruned_ops.runtime.refusals import refuse_encoder

REFUSED = refuse_encoder(stock_model().bert, bfloat16=True)  # bfloat16 on this processor
SHAPE = ModelShape((LayerShape(2, 20), LayerShape(4, 40)), 32, 8)
WORKLOAD = Workload("tiny", ((5, 3), (9, 1)))


def table(**changes: Any) -> LatencyTable:
    """A table that holds here for SHAPE, with numbers of which sums are exact."""
    made = LatencyTable(
        32, 8, "gelu", "float32", WORKLOAD, 1.0,
        ((0, 0.5), (1, 1.0), (4, 4.0)), ((0, 0.25), (32, 2.25), (40, 8.25)),
        ((8, 1.125), (16, 1.015625), (32, 1.0)), {**machine(), "device": "cpu"}, versions(),
        layer_backends(32, 8, LayerShape(4, 40), "gelu", "cpu"), "pruned-ops latency-table t.json --length 9",
        "BERT",
    )  # fmt: skip
    return replace(made, **changes)


def config(**fields: Any) -> BertConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    return BertConfig(**{**sizes, "vocab_size": 50, "max_position_embeddings": 20, **fields})


def test_predict_interpolates() -> None:
    made = table()
    for heads, ms in made.attention:
        assert made.attention_ms(heads) == ms
    for width, ms in made.ffn:
        assert made.ffn_ms(width) == ms
    assert made.attention_ms(3) == 3.0 and made.ffn_ms(16) == 1.25 and made.ffn_ms(34) == 3.75
    assert made.part_ms(LayerShape(3, 34)) == 6.75
    assert made.predict([]) == 1.0
    assert made.predict([LayerShape(3, 34), LayerShape(0, 0)]) == 1.0 + 6.75 + 0.75
    assert made.align == 16
    for layer, message in ((LayerShape(5, 0), "num_heads is 5"), (LayerShape(0, 41), "ffn_width is 41")):
        with pytest.raises(ValueError, match=f"{message}; the table reaches from 0 to"):
            made.predict([layer])


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table().save(path)
    assert LatencyTable.load(path) == table()
    data = json.loads(path.read_text())
    assert data.pop("family") == "BERT" and data["format"] == 1
    with pytest.raises(TypeError):
        table(machine={"no": object()}).save(path)
    assert LatencyTable.load(path) == table()
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]
    path.write_text(json.dumps(data))  # as earlier versions wrote it: --overwrite replaces it
    assert LatencyTable.load(path) == table(family=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, '"format": 1 is needed'),
        ({"more": 1}, "missing or unknown: more"),
        ({"base_ms": math.nan}, "'NaN' is no finite number: line"),
        ({"base_ms": "1"}, "base_ms is '1'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"head_dim": True}, "head_dim is True"),
        ({"hidden_act": 3}, "hidden_act is 3"),
        ({"machine": []}, r"machine is \[\]"),
        ({"command": 3}, "command is 3"),
        ({"attention": 3}, "attention is no list of pairs"),
        ({"attention": [[0, 1.0, 2]]}, "attention is no list of pairs"),
        ({"attention": [[1, 1.0]]}, "attention must begin at size 0"),
        ({"attention": [[0, 1.0], [2, 0.5]]}, "its times must never fall"),
        ({"ffn": [[0, 1.0], [0, 1.0]]}, "sizes in ffn do not rise"),
        ({"ffn": []}, "sizes in ffn do not rise"),
        ({"ffn": [[0, -1.0]]}, "ffn at 0 is -1.0"),
        ({"ffn": [[0.5, 1.0]]}, "a size in ffn is 0.5"),
        ({"alignment": [[8, 1.5]]}, "1.0 as its least cost"),
        ({"workload": {"name": "x"}}, "workload needs exactly"),
        ({"workload": {"name": "x", "batches": [3]}}, "batches are no lists"),
        ({"workload": {"name": "x", "batches": [[-3]]}}, "a length in workload is -3"),
    ],
)
def test_load_refuses(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"table.json is no latency table: .*{message}"):
        LatencyTable.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"{}", b"[" * 100_000])
def test_load_refuses_other_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ValueError, match="t.json is no latency table"):
        LatencyTable.load(tmp_path / "t.json")
    with pytest.raises(FileNotFoundError, match="missing.json"):
        LatencyTable.load(tmp_path / "missing.json")


def test_refuse_names_what_differs() -> None:
    made = table()
    assert made.refuse(SHAPE, config()) is None
    assert made.refuse(ModelShape((), 32, 8), config()) is None
    torch_here = versions()["torch"]
    cases = [
        (table(versions={**versions(), "torch": "2.0"}), f"it was made with torch 2.0, here is {torch_here}"),
        (table(versions={**versions(), "pruned-ops": "0.0"}), "pruned-ops 0.0, here is"),
        (table(hidden_size=64), "hidden_size 64, here is 32"),
        (table(head_dim=16), "head_dim 16, here is 8"),
        (table(hidden_act="relu"), "hidden_act relu, here is gelu"),
        (table(dtype="bfloat16"), "dtype bfloat16, here is float32"),
        (table(family="DeBERTa"), "family DeBERTa, here is BERT"),
        (table(family=None), "family none, here is BERT"),
        (table(attention=((0, 1.0), (3, 1.0))), "num_heads up to 3, here is 4"),
        (table(ffn=((0, 1.0), (32, 1.0))), "ffn_width up to 32, here is 40"),
        (table(backends={**made.backends, "encoder": "none such"}), "encoder on backend none such, here"),
    ]
    for name in ("processor", "cores", "threads", "cpu_capability", "accelerator", "device"):
        cases.append((table(machine={**made.machine, name: "another"}), f"{name} another, here is"))
    for changed, sentence in cases:
        assert sentence in (changed.refuse(SHAPE, config()) or ""), sentence
    both = table(hidden_size=64, dtype="bfloat16").refuse(SHAPE, config())
    assert both == "it was made with dtype bfloat16, here is float32; with hidden_size 64, here is 32"
    assert "device cpu, here is cuda" in (made.refuse(SHAPE, config(), device="cuda") or "")


def test_remake_command() -> None:
    """For the file, the model and the machine that asked, whatever the table was made for; see
    test_latency_command.py for such a command that runs."""
    start = "pruned-ops latency-table x.json --model m"
    end = "--device cpu --overwrite"
    assert table().remake_command("x.json", "m") == f"{start} --length 9 {end}"
    made_by = (
        "pruned-ops latency-table t.json --mod='other one' --data 'my data.json' --batch-s=3 --dtype int8"
    )
    remade = table(command=f"{made_by} --dtype int8 --skip-bad --threads 9 --overwrite").remake_command(
        "x.json", "m", "bfloat16", "cuda", 2
    )
    options = "--data 'my data.json' --batch-size 3 --skip-bad --dtype bfloat16"
    assert remade == f"{start} {options} --device cuda --threads 2 --overwrite"
    for command in (None, "by 'hand", "make table --rounds"):
        unnamed = table(command=command).remake_command("x.json", "m")
        assert unnamed == f"{start} --data SQUAD.json --batch-size 2 --batches 2 {end}"
    fixed = table(command=None, workload=Workload.fixed(7, 4, 3))
    assert fixed.remake_command("x.json", "m") == f"{start} --length 7 --batch-size 4 --batches 3 {end}"


def test_sizes() -> None:
    assert head_counts(12) == list(range(13)) and head_counts(0) == [0]
    assert len(head_counts(32)) == 13 and {0, 1, 32} <= set(head_counts(32))
    widths = ffn_widths(1536)
    assert widths[0] == 0 and widths[-1] == 1536 and len(widths) == 17
    assert all(width % 64 == 0 for width in widths)
    assert ffn_widths(0) == [0] and ffn_widths(5) == [0, 5]
    assert list(aligned_widths(1536)) == [8, 16, 32, 64, 128]
    for align, found in aligned_widths(1536).items():
        assert len(found) == 3 and all(width % (2 * align) == align for width in found)
    assert list(aligned_widths(100)) == [8] and aligned_widths(5) == {8: []}


def test_curves_rise_and_alignments_compare() -> None:
    assert _rising([(0, 1.0), (1, 3.0), (2, 2.0), (3, 4.0)]) == ((0, 1.0), (1, 2.5), (2, 2.5), (3, 4.0))
    assert [ms for _, ms in _rising([(0, 3.0), (1, 2.0), (2, 1.0)])] == [2.0, 2.0, 2.0]
    curve = tuple((width, 1.0 + width / 128) for width in range(0, 257, 32))
    on_line = {f"ffn {w}": 1.0 + w / 128 for ws in aligned_widths(256).values() for w in ws}
    slow = {name: ms * (1.5 if int(name[4:]) % 16 else 1.0) for name, ms in on_line.items()}
    assert dict(_alignment(curve, slow)) == pytest.approx({8: 1.5, 16: 1.0, 32: 1.0})


def test_chosen_batches() -> None:
    workload = Workload(
        "w", tuple((tokens,) for tokens in (16, 3, 5, 7, 9, 11, 13, 15, 1, 2, 4, 6, 8, 10, 12, 14))
    )
    chosen = chosen_batches(workload)
    assert chosen.batches == ((3,), (7,), (11,), (15,))
    assert chosen_batches(WORKLOAD) == WORKLOAD


@pytest.mark.parametrize(("seconds", "batches"), [(0.9, [3, 7, 11, 15]), (7.0, [7, 15]), (1e3, [11])])
def test_a_slow_machine_times_fewer_batches(seconds: float, batches: list[int]) -> None:
    """All rounds fit into MOST_SECONDS, or time one batch; the table is of the workload's mean batch."""
    workload = Workload("w", tuple((tokens,) for tokens in range(1, 17)))
    rounds, timed = 5, list[int]()

    class Clock(HostClock):
        """The time goes by tokens; a round of a mean batch (8.5 tokens) takes so many seconds."""

        def seconds(self, name: str, runner: Runner, batch: dict[str, Tensor]) -> float:
            timed.append(int(batch["attention_mask"].sum()))
            return seconds / parts * timed[-1] / 8.5

    aligned = itertools.chain(*aligned_widths(40).values())
    parts = len(head_counts(4)) + len({*ffn_widths(40), *aligned})
    table = measure_table(config(), workload, rounds, progress=False, clock=Clock())
    per_turn = parts + 1  # and the model with empty layers
    assert sorted(set(timed[per_turn:])) == batches
    assert len(timed) == per_turn * (1 + rounds * len(batches))
    assert table.workload == workload
    assert table.ffn_ms(40) == pytest.approx(1000 * seconds / parts / 2)  # a mean batch's, of two layers


@pytest.mark.parametrize("kind", ["bert", "pruned-roberta", "empty"])
def test_measure(kind: str) -> None:
    empty = {"shapes": [LayerShape(0, 0)] * 2}
    made_config = {
        "bert": lambda: config(hidden_act="relu"),
        "pruned-roberta": lambda: pruned_model("roberta").config,
        "empty": lambda: pruned_model("bert", **empty).config,
    }[kind]()
    heads, width = {"bert": (4, 40), "pruned-roberta": (4, 72), "empty": (0, 0)}[kind]
    torch.manual_seed(3)
    made = measure_table(made_config, WORKLOAD, rounds=2, progress=False, command="c")
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert [n for n, _ in made.attention] == head_counts(heads)
    assert [w for w, _ in made.ffn] == ffn_widths(width)
    for points in (made.attention, made.ffn):
        times = [ms for _, ms in points]
        assert times == sorted(times) and all(0 < ms < math.inf for ms in times)
    assert made.alignment[0][0] == 8 and made.align in dict(made.alignment)
    assert 0 <= made.base_ms < math.inf and made.workload == WORKLOAD and made.command == "c"
    layer_by_layer = {"attention", "linear_add_layer_norm"}  # one call computes gelu only
    assert set(made.backends) == {"embed_layer_norm", *(layer_by_layer if kind == "bert" else {"encoder"})}
    head_dim = 8 if kind == "bert" else 16
    shape = ModelShape((LayerShape(heads, width),) * 2, made.hidden_size, head_dim)
    assert made.refuse(shape, made_config) is None


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("stem", PRUNED_TYPES.values())
def test_measure_every_family(stem: str, dtype: str | None) -> None:
    """Chains of attentions alone and of FFNs alone, in the one call that the family's models are."""
    dense = stock(stem, "").config
    with record() as ran:
        made = measure_table(dense, WORKLOAD, 1, progress=False, dtype=dtype)
    assert [n for n, _ in made.attention] == [0, 1, 2, 3, 4] and made.ffn[-1][0] == 96
    assert "encoder" in ran and made.hidden_size == 64


def test_a_table_holds_for_the_family_that_it_was_made_for() -> None:
    """Layers whose LayerNorms come first have other ops than BERT's, where they do not run in one call."""
    dense = stock("ModernBert", "", hidden_act="silu").config
    measured = measure_table(dense, WORKLOAD, 1, progress=False)
    assert "attention" in measured.backends and "linear_add_layer_norm" not in measured.backends
    shape = ModelShape((LayerShape(4, 96),) * 2, 64, 16)
    assert measured.refuse(shape, dense) is None


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_measure_in_another_dtype(dtype: str) -> None:
    """The table says what it is of, and holds for that alone."""
    if dtype == "bfloat16" and REFUSED is not None:
        pytest.skip(REFUSED)
    with record() as ran:
        made = measure_table(config(intermediate_size=42), WORKLOAD, 1, progress=False, dtype=dtype)
    assert made.dtype == dtype and {*ran} == {"embed_layer_norm", "encoder"}
    shape = ModelShape((LayerShape(4, 42),) * 2, 32, 8)
    assert made.refuse(shape, config(), dtype) is None
    assert f"dtype {dtype}, here is float32" in (made.refuse(shape, config()) or "")


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_timed_parts_have_the_panels_of_a_packed_encoder(dtype: str) -> None:
    encoder = PrunedEncoder(ModelShape((LayerShape(3, 42),), 36, 8))
    encoder.pack(int8=encoder.linear_names if dtype == "int8" else (), bfloat16=dtype == "bfloat16")
    packed = encoder.laid_out
    assert isinstance(packed, PanelWeights)
    for number, part in enumerate(encoder.parts):
        row = _Row(_weights(1, 40_000, dtype)[0])
        for place, linear in enumerate(part.linears):
            panels, bias = row.panels(linear.in_features, linear.out_features)
            expected = packed.weights[PART_TENSORS * number + 2 * place :][:2]
            assert [(t.shape, t.dtype) for t in (panels, bias)] == [(t.shape, t.dtype) for t in expected]
            assert (panels.data_ptr() - row.memory.data_ptr()) % 64 == 0


def test_measure_refuses() -> None:
    for wrong, workload, rounds, message in (
        (AlbertConfig(), WORKLOAD, 2, "a albert model is not measured"),
        (config(), WORKLOAD, 0, "rounds is 0"),
        (config(), Workload("w", ()), 2, "workload w has no batch"),
        (config(), Workload("w", ((0,),)), 2, "without tokens"),
        (config(), Workload("w", ((1,), (21,))), 2, "position table allows 20"),
        (RobertaConfig(max_position_embeddings=20), Workload("w", ((19,),)), 2, "position table allows 18"),
        (
            config(hidden_act="tanh"),
            WORKLOAD,
            2,
            "hidden_act is 'tanh'; gelu, relu, silu, gelu_new are supported",
        ),
        (
            config(quantization_config={"quant_method": METHOD, "linears": []}),
            WORKLOAD,
            2,
            "weights are stored in int8, and it runs in int8",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            measure_table(wrong, workload, rounds, progress=False)
