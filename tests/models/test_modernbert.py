"""What ModernBERT alone has: windows, rotary positions, two ways to pool, and configs of two generations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import ModernBertConfig, ModernBertModel

import pruned_ops
from family_models import ANSWERS, TEXTS, WORDS, batch, fields, largest_difference, outputs, pruned, stock
from inputs import shake
from pruned_ops.layers.kinds import ByPosition
from pruned_ops.models.families.modernbert import GLOBAL, LOCAL, MODERNBERT
from pruned_ops.models.inputs import mean_states
from pruned_ops.models.stock import model_shape
from pruned_ops.ops.registry import record
from pruned_ops.runtime.packed_heads import mean_rows
from pruned_trainer import Decision, attached, compact
from pruned_trainer.jobs.job import budget_for
from pruned_trainer.pruning.compensate import compensate
from pruned_trainer.pruning.decision import Kept, LayerDecision

CLOSE = 2e-5
IS_5 = int(transformers.__version__.split(".")[0]) >= 5


def config(**more: Any) -> ModernBertConfig:
    return ModernBertConfig(**{**fields("ModernBert", num_hidden_layers=5), **more})


def encoder(**more: Any) -> Any:
    torch.manual_seed(0)
    return shake(ModernBertModel(config(**more)).eval(), 0)


@pytest.mark.parametrize("window", [2, 8, 30, 128])
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_windows_of_all_sizes(kind: str, window: int) -> None:
    """Five layers, two of them global, over texts that are longer and shorter than the window."""
    model, inputs = encoder(local_attention=window), batch(kind, (70, 1, 33, 64))
    expected = outputs(model, inputs)
    with record() as ran:
        assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= CLOSE
    assert ran["encoder"].total() == 1 if "cpu" in ran["encoder"] else True


def test_a_window_is_there() -> None:
    """Of 128 tokens that a layer sees at once, one that is 65 away is not among them, and one 64 away is."""
    if not IS_5:
        pytest.skip("a first layer that is local needs transformers 5")
    more = {"num_hidden_layers": 1, "layer_types": [LOCAL], "local_attention": 128}
    fast, ids = pruned_ops.optimize(encoder(**more)), torch.randint(5, 100, (1, 100))
    first = fast(input_ids=ids).last_hidden_state
    for place, changes in ((65, False), (64, True)):
        other = ids.clone()
        other[0, place] = 5 if ids[0, place] != 5 else 6
        assert torch.equal(fast(input_ids=other).last_hidden_state[0, 0], first[0, 0]) is not changes


@pytest.mark.parametrize("biases", [True, False])
def test_with_and_without_biases(biases: bool) -> None:
    more = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias"), biases)
    model, inputs = encoder(**more), batch("left")
    expected = outputs(model, inputs)
    assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= CLOSE


@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_new"])
def test_activations(activation: str) -> None:
    model, inputs = encoder(hidden_activation=activation), batch("holes")
    expected = outputs(model, inputs)
    assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= CLOSE


def test_hidden_states() -> None:
    """As in transformers 5, where the last of them is the model's output."""
    model, inputs = encoder(), batch("right")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        found = pruned_ops.optimize(model)(**inputs, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected) == 6
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    for one, other in list(zip(found.hidden_states, expected, strict=True))[: None if IS_5 else -1]:
        torch.testing.assert_close(one[real], other[real], atol=CLOSE, rtol=0)


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_the_mean_of_a_text_is_that_of_its_tokens(kind: str) -> None:
    """Padding on the left is no trouble where no head reads the first position."""
    model, inputs = stock("ModernBert", TEXTS, classifier_pooling="mean"), batch(kind)
    expected = outputs(model, inputs)
    assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= CLOSE
    narrow = pruned("pruned_modernbert", TEXTS, classifier_pooling="mean")
    expected = outputs(narrow, inputs)
    assert largest_difference(outputs(pruned_ops.optimize(narrow), inputs), expected) <= CLOSE


def test_means_of_rows() -> None:
    states, bounds = torch.arange(12.0).view(6, 2), torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    assert mean_rows(states, bounds).tolist() == [[1.0, 2.0], [0.0, 0.0], [7.0, 8.0]]
    # As elsewhere than on a CPU.
    sums = torch.segment_reduce(states, "sum", offsets=bounds.long(), axis=0, unsafe=True)
    assert sums.tolist() == [[2.0, 4.0], [0.0, 0.0], [28.0, 32.0]]
    assert mean_rows(states.to("meta"), bounds.to("meta")).shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_many_rows_of_halves(dtype: torch.dtype) -> None:
    """Sums that a half cannot hold, and sums that would not grow any more."""
    states = torch.tensor([[40.0, 1.0]], dtype=dtype).expand(8000, 2)
    found = mean_rows(states, torch.tensor([0, 8000], dtype=torch.int32))
    assert found.dtype == dtype and found.tolist() == [[40.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_many_padded_states_of_halves(dtype: torch.dtype) -> None:
    """The same, in the padded model."""
    states = torch.tensor([40.0, 1.0], dtype=dtype).expand(1, 8000, 2)
    mask = (torch.arange(8000) < 7001).long()[None]
    assert mean_states(states, mask).dtype == dtype and mean_states(states, mask).tolist() == [[40.0, 1.0]]


def test_tied_words_stay_tied() -> None:
    model, inputs = stock("ModernBert", WORDS), batch("right")
    assert model.decoder.weight is model.model.embeddings.tok_embeddings.weight
    expected = outputs(model, inputs)
    fast = pruned_ops.optimize(model)
    assert largest_difference(outputs(fast, inputs), expected) <= CLOSE
    assert pruned_ops.restore(fast).decoder.weight is model.model.embeddings.tok_embeddings.weight


@pytest.mark.parametrize("every", [1, 2, 3])
def test_configs_of_transformers_4_and_5(every: int) -> None:
    """Both say the same of the same model: in layer_types and rope_parameters, or in numbers and bases."""
    sizes = {
        "num_hidden_layers": 5, "local_attention": 10, "attention_bias": False, "mlp_bias": False,
        "norm_bias": False,
    }  # fmt: skip
    bases = {"global_rope_theta": 800.0, "local_rope_theta": 90.0}
    old: Any = SimpleNamespace(**sizes, **bases, global_attn_every_n_layers=every)
    new: Any = SimpleNamespace(
        **sizes,
        layer_types=[LOCAL if i % every else GLOBAL for i in range(5)],
        rope_parameters={GLOBAL: {"rope_theta": 800.0}, LOCAL: {"rope_theta": 90.0}},
    )
    kinds = MODERNBERT.kind(old), MODERNBERT.kind(new)
    assert kinds[0] == kinds[1]
    assert kinds[0].of_layer(0) == ByPosition(800.0)
    assert kinds[0].of_layer(4) == (ByPosition(90.0, 5) if 4 % every else ByPosition(800.0))
    old.local_rope_theta = None  # then the layers that are local take the others' base
    assert MODERNBERT.kind(old).of_layer(4).rotary_base == 800.0


def test_old_configs_give_the_old_model() -> None:
    """A checkpoint that transformers 4 saved has the old names."""
    bases = {"global_rope_theta": 800.0, "local_rope_theta": 90.0, "global_attn_every_n_layers": 2}
    model, inputs = encoder(**bases), batch("right")
    assert MODERNBERT.kind(model.config).of_layer(1) == ByPosition(90.0, 4)
    expected = outputs(model, inputs)
    assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= CLOSE


def test_the_compile_flag_of_transformers_4_changes_nothing() -> None:
    model, inputs = encoder(reference_compile=False), batch("right")
    expected = outputs(model, inputs)
    assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= CLOSE


def test_what_is_refused() -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    if IS_5:
        model = encoder(rope_parameters={GLOBAL: scaled, LOCAL: {"rope_type": "default", "rope_theta": 1e4}})
        with pytest.raises(ValueError, match=f"rope_parameters of {GLOBAL} is .*only rotary positions"):
            pruned_ops.optimize(model)
    inputs = batch("right")
    places = torch.arange(inputs["input_ids"].size(1))[None]
    fast = pruned_ops.optimize(encoder())
    with pytest.raises(ValueError, match="position_ids were given: a ModernBERT counts the places"):
        fast(**inputs, position_ids=places)
    with pytest.raises(ValueError, match="position_ids were given"):
        pruned("pruned_modernbert", "")(**inputs, position_ids=places)


def test_what_is_not_imported(tmp_path: Path) -> None:
    stock("ModernBert", ANSWERS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a ModernBERT, of which no other tool's checkpoints are known"):
        pruned_ops.import_checkpoint(tmp_path)


def test_what_pruning_refuses() -> None:
    model = stock("ModernBert", ANSWERS)
    with (
        pytest.raises(ValueError, match="hidden dimensions of a ModernBERT are not pruned"),
        attached(model, parts=["hidden"]),
    ):
        pass
    half = Kept(tuple(range(32)), (1.0,) * 32)  # a decision that another model's gates made
    every = LayerDecision(Kept(tuple(range(4)), (1.0,) * 4), Kept(tuple(range(96)), (1.0,) * 96))
    with pytest.raises(ValueError, match="hidden dimensions of a ModernBERT are not pruned"):
        compact(model, Decision((every,) * 2, 1, {}, {}, hidden=half))


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_what_follows_from_the_rest_is_compensated(biases: bool, layer_by_layer: bool) -> None:
    """Each first head and unit is a copy of the second, with other outputs: least squares recover it."""
    model, inputs = encoder(attention_bias=biases, mlp_bias=biases), batch("holes")
    heads, units = model.config.num_attention_heads, model.config.intermediate_size
    with torch.no_grad():
        for layer in model.layers:
            for linear, matrices, kept in ((layer.attn.Wqkv, 3, heads), (layer.mlp.Wi, 2, units)):
                for parameter in linear.parameters():
                    each = parameter.view(matrices, kept, -1)
                    each[:, 0] = each[:, 1]
            layer.mlp.Wo.weight[:, 0] += torch.randn(model.config.hidden_size)

    def rest(number: int) -> Kept:
        return Kept(tuple(range(1, number)), (1.0,) * (number - 1))

    decision = Decision((LayerDecision(rest(heads), rest(units)),) * len(model.layers), 1, {}, {})
    batches = [batch(kind, (70, 33, 64)) for kind in ("right", "left", "holes")]
    expected, bare, solved = outputs(model, inputs), compact(model, decision), compact(model, decision)
    compensate(solved, model, decision, batches, "least-squares", layer_by_layer=layer_by_layer, ridge=1e-12)
    assert largest_difference(outputs(solved, inputs), expected) <= 1e-3
    assert largest_difference(outputs(bare, inputs), expected) > 1e-1
    if biases:
        compact(model, decision, batches, "bias")
    else:
        done = compensate(compact(model, decision), model, decision, batches)
        assert set(done.methods.values()) == {"least-squares"}
        refused = "of heads and ffn have no bias in this ModernBertModel"
        with pytest.raises(ValueError, match=refused):
            compact(model, decision, batches, "bias")
        settings: Any = SimpleNamespace(
            task="squad", parts=("heads", "ffn"), compensation="bias", targets=(), decision=None
        )
        with pytest.raises(ValueError, match=refused):  # before any training
            budget_for(settings, model, [5], None)


def test_a_unit_counts_three_rows() -> None:
    """In a gated FFN; and nothing counts biases, which this family lacks."""
    model = encoder()
    shape = pruned("pruned_modernbert", "").config.shape
    assert shape.gated and not shape.biases
    dense = model_shape(model)
    counted = sum(
        parameter.numel() for name, parameter in model.named_parameters() if name.startswith("layers.")
    )
    assert dense.parameters() == counted + 64  # the first layer lacks one of its LayerNorms
    near, far = model.config.local_attention // 2, None
    assert dense.windows == (far, near, near, far, near)
    assert pruned("pruned_modernbert", "").config.shape.windows == dense.windows[: len(shape.layers)]
