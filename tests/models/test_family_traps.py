"""What each family takes otherwise than BERT is right, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

import pruned_ops
from family_models import (
    ANSWERS,
    PRUNED_TYPES,
    SIZES,
    TEXTS,
    TOKENS,
    batch,
    family_named,
    fields,
    largest_difference,
    outputs,
    pruned,
    stock,
)
from inputs import READY, shake
from pruned_ops.cli import main
from pruned_ops.layers.kinds import Disentangled
from pruned_ops.models.configuration import PRUNED_CONFIGS
from pruned_ops.models.families.known import family_of
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.models.relative_bias import bucket_of_distance
from pruned_ops.models.stock import model_shape
from pruned_ops.ops.registry import record
from pruned_ops.runtime.optimize import optimized
from pruned_trainer import SizeBudget, Target, attach, attached, compact, decide
from pruned_trainer.pruning.decision import Decision, Kept, LayerDecision
from tiny_tokenizers import word_tokenizer, words


def typed(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])}


def test_distilbert_has_no_token_types() -> None:
    """Those that a tokenizer gives are not looked at, as in stock transformers 5."""
    inputs = batch("right")
    stock_takes_them = int(transformers.__version__.split(".")[0]) >= 5
    models = [stock("DistilBert", ANSWERS)] if stock_takes_them else []
    for model in (*models, pruned("pruned_distilbert", ANSWERS)):
        expected = outputs(model, inputs)
        assert largest_difference(outputs(pruned_ops.optimize(model), typed(inputs)), expected) <= 2e-5
        with pytest.raises((ValueError, RuntimeError), match="expand|shape"):
            model(**inputs, token_type_ids=torch.zeros(3, 5, dtype=torch.long))


def test_distilbert_takes_its_own_order_of_arguments() -> None:
    """Its third argument is inputs_embeds (head_mask on transformers 4), which is refused by name."""
    model, inputs = pruned_ops.optimize(stock("DistilBert", "")), batch("right")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        found = model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="does not take (inputs_embeds|head_mask)"):
        model(None, inputs["attention_mask"], torch.zeros(4, 20, 64))


@pytest.mark.parametrize("kind", ["left", "holes", "right"])
@pytest.mark.parametrize("stem", ["Bert", "Roberta", "MPNet", "pruned_bert", "pruned_roberta"])
def test_a_pooler_reads_the_first_real_token(stem: str, kind: str) -> None:
    """On whichever side the padding is, padded and packed: as of each text alone."""
    if stem in PRUNED_TYPES:
        model = pruned(stem, "")
        torch.manual_seed(0)
        model = shake(type(model)(model.config, add_pooling_layer=True).eval(), 0)
    else:
        model = stock(stem, "")
    inputs = batch(kind)
    real = inputs["attention_mask"].bool()
    if not family_of(model.config).positions_from_padding:
        inputs["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
    inputs["input_ids"][~real] = SIZES["pad_token_id"]
    with torch.no_grad():
        texts = [ids[own][None] for ids, own in zip(inputs["input_ids"], real, strict=True)]
        expected = torch.cat([model(input_ids=ids).pooler_output for ids in texts])
        padded = model(**inputs).pooler_output
        found = pruned_ops.optimize(model)(**inputs).pooler_output
    if stem == "MPNet" and kind == "holes":
        expected = padded  # its biases go by places in the batch
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    if stem in PRUNED_TYPES or kind != "left":
        torch.testing.assert_close(padded, expected, atol=2e-5, rtol=1e-4)


def test_distilbert_has_no_pooler(tmp_path: Path) -> None:
    model = pruned("pruned_distilbert", "")
    with pytest.raises(ValueError, match="DistilBERT has no pooler"):
        type(model)(model.config, add_pooling_layer=True)
    model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).pooler is None


@pytest.mark.parametrize("stem", ["Roberta", "XLMRoberta", "Data2VecText"])
def test_one_token_type(stem: str) -> None:
    model, inputs = pruned_ops.optimize(stock(stem, ANSWERS)), batch("right")
    with pytest.raises(IndexError, match="token_type_ids holds 1; its table has 1 rows"):
        model(**typed(inputs))


@pytest.mark.parametrize(
    ("stem", "longest"),
    [("Bert", 80), ("Roberta", 78), ("DistilBert", 80), ("Data2VecText", 78), ("Electra", 80)],
)
def test_the_table_of_positions(stem: str, longest: int) -> None:
    model = pruned_ops.optimize(stock(stem, ANSWERS))
    assert longest_sequence(model.config) == longest
    assert outputs(model, batch("right", (longest, 2)))
    message = f"{longest + 1} tokens; the model's position table allows {longest}"
    with pytest.raises(ValueError, match=message):
        model(**batch("right", (longest + 1,)))


def test_a_config_takes_its_publishers_names_and_berts() -> None:
    own = AutoConfig.for_model("pruned_distilbert", **fields("DistilBert"))
    of_bert = AutoConfig.for_model("pruned_distilbert", vocab_size=100, hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=80, pad_token_id=1,
        initializer_range=0.2)  # fmt: skip
    assert own.to_dict() == of_bert.to_dict()
    assert (
        (own.dim, own.hidden_dim, own.n_layers) == (64, 96, 2) == (own.hidden_size, own.intermediate_size, 2)
    )
    with pytest.raises(ValueError, match="hidden_dim is 0: it must lie between 1"):
        AutoConfig.for_model("pruned_distilbert", **{**fields("DistilBert"), "hidden_dim": 0})
    with pytest.raises(ValueError, match="it is a 'albert' model; one of bert, pruned_bert, roberta"):
        family_of(AutoConfig.for_model("albert"))
    assert family_named("Camembert").name == "RoBERTa"


def test_a_changed_head_is_not_computed_in_its_place() -> None:
    """Another module in the head of texts: the model's own forward computes it."""
    inputs = batch("right")
    for change in (
        lambda model: setattr(model, "pre_classifier", torch.nn.Sequential(model.pre_classifier)),
        lambda model: model.classifier.register_forward_hook(lambda *call: call[-1] * 2),
    ):
        model = stock("DistilBert", TEXTS)
        change(model)
        expected = outputs(model, inputs)
        assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= 2e-5


def test_ernies_task_types_are_refused() -> None:
    with pytest.raises(ValueError, match="optimize cannot take .*use_task_id is True, only False"):
        pruned_ops.optimize(stock("Ernie", ANSWERS, use_task_id=True))
    with pytest.raises(ValueError, match="use_task_id is True, only False is computed"):
        AutoConfig.for_model("pruned_ernie", **fields("Ernie", use_task_id=True))
    model, inputs = stock("Ernie", ""), batch("right")
    types = typed(inputs)["token_type_ids"]
    # In its order, task_type_ids stand before position_ids.
    positions = torch.arange(20).flip(0)[None]
    with torch.no_grad():
        expected = model(inputs["input_ids"], inputs["attention_mask"], types, None, positions)
        pruned_ops.optimize(model)
        found = model(inputs["input_ids"], inputs["attention_mask"], types, None, positions)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[0][real], expected[0][real], atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="an optimised encoder does not take task_type_ids"):
        model(**inputs, task_type_ids=types)


def test_electras_embeddings_of_the_hidden_size_need_no_projection() -> None:
    model, inputs = stock("Electra", TEXTS, embedding_size=64), batch("holes")
    assert not hasattr(model.electra, "embeddings_project")
    expected = outputs(model, inputs)
    with attached(model, parts=["hidden"]) as gates:
        gates.locations()[0].data = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 3
        decision = decide(gates.scores(), SizeBudget(gates.shape, "params"), Target(params=0.6), 1)
        gates.fix(decision.values(gates.shape))
        gated = outputs(model, inputs)
    narrow = compact(model, decision)
    assert narrow.config.embedding_size == narrow.config.hidden_size < 64
    assert largest_difference(outputs(narrow, inputs), gated) <= 2e-4
    assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= 2e-5


def test_electra_cannot_lose_just_its_projection() -> None:
    model = stock("Electra", TEXTS)
    with attached(model, parts=["hidden"]) as gates:
        decision = decide(gates.scores(), SizeBudget(gates.shape, "params"), Target(params=0.76), 1)
    kept = replace(decision.hidden, indices=tuple(range(48)), values=(1.0,) * 48)
    with pytest.raises(ValueError, match="as many as the embeddings have.*no embeddings_project"):
        compact(model, replace(decision, hidden=kept))


def test_electras_projection_is_held_against_the_config() -> None:
    model = stock("Electra", "")
    model.embeddings_project = torch.nn.Linear(48, 64, bias=False)
    with pytest.raises(ValueError, match="its embeddings_project has no bias, and the config describes one"):
        pruned_ops.optimize(model)
    with pytest.raises(ValueError, match="embedding_size is 0: it must lie between 1"):
        AutoConfig.for_model("pruned_electra", **fields("Electra", embedding_size=0))


def test_electras_discriminator_reads_packed_states() -> None:
    """A head that is not known runs as it is, on the padded states of a packed encoder."""
    model, inputs = stock("Electra", "PreTraining"), batch("right")
    expected = outputs(model, inputs)
    with pruned_ops.record() as ran:
        found = outputs(pruned_ops.optimize(model), inputs)
    assert ran["embed_layer_norm"] and largest_difference(found, expected) <= 2e-5


def test_mpnets_bias_counts_places_where_the_mask_has_holes() -> None:
    """The distance of two tokens is that of their places in the padded row, not in the packed one."""
    model, inputs = stock("MPNet", ""), batch("holes", (60, 40, 9))
    expected = outputs(model, inputs)
    found = outputs(pruned_ops.optimize(model), inputs)
    assert largest_difference(found, expected) <= 2e-5
    places = inputs["attention_mask"].bool()
    packed = {name: value[:1][:, places[0]] for name, value in inputs.items()}
    elsewhere = outputs(model, packed)["last_hidden_state"]
    assert (elsewhere - expected["last_hidden_state"][: len(elsewhere)]).abs().max() > 1e-2


def test_mpnets_distances_share_the_publishers_buckets() -> None:
    model = stock("MPNet", "")
    bias = family_of(model.config).relative_bias
    assert bias is not None
    distance = torch.arange(-300, 301)
    ours = bucket_of_distance(bias)[distance.clamp(-bias.reach, bias.reach) + bias.reach]
    assert torch.equal(ours, model.encoder.relative_position_bucket(distance, num_buckets=32))


def test_mpnets_pruned_heads_take_their_columns_along(tmp_path: Path) -> None:
    """Twice pruned, and saved: each layer's heads are written down by their numbers in the dense model."""
    model, inputs = stock("MPNet", ANSWERS, num_attention_heads=8), batch("holes")
    for keep in ([(1, 4, 6, 7), (0, 2, 5)], [(0, 3), (2,)]):
        shape = model_shape(model)
        kept = [
            LayerDecision(Kept(heads, (1.0,) * len(heads)), Kept(tuple(range(96)), (1.0,) * 96))
            for heads in keep
        ]
        with attached(model) as gates:
            gates.fix(Decision(tuple(kept), 1, {}, {}).values(shape))
            gated = outputs(model, inputs)
        model = compact(model, Decision(tuple(kept), 1, {}, {}))
        assert largest_difference(outputs(model, inputs), gated) <= 2e-5
    assert model.config.head_indices == [[1, 7], [5]]
    model.save_pretrained(tmp_path)
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert again.config.head_indices == [[1, 7], [5]]
    assert largest_difference(outputs(again, inputs), outputs(model, inputs)) == 0
    assert largest_difference(outputs(pruned_ops.optimize(again), inputs), gated) <= 2e-5


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (None, "head_indices are needed: which of the dense model's 4 heads each layer has"),
        ([[0], [1]], r"head_indices\[1\] is \[1\]: 2 numbers of heads are needed"),
        ([[0], [1, 4]], r"head_indices\[1\] is 4: it must lie between 0 and 3"),
        ([[0], [1, 1]], r"head_indices\[1\] is \[1, 1\]: the numbers have to rise"),
        ([[0]], "a list for each layer is needed"),
    ],
)
def test_which_heads_are_left_is_checked(indices: Any, message: str) -> None:
    shapes = [{"num_heads": 1, "ffn_width": 96}, {"num_heads": 2, "ffn_width": 96}]
    with pytest.raises(ValueError, match=message):
        AutoConfig.for_model("pruned_mpnet", **fields("MPNet"), layer_shapes=shapes, head_indices=indices)
    with pytest.raises(ValueError, match="head_indices are for heads with a bias: BERT has none"):
        AutoConfig.for_model("pruned_bert", **fields("Bert"), head_indices=[[0], [0]])


def test_mpnets_number_of_buckets_is_its_codes() -> None:
    with pytest.raises(ValueError, match="relative_attention_num_buckets is 16, only 32 is computed"):
        pruned_ops.optimize(stock("MPNet", ANSWERS, relative_attention_num_buckets=16))


def test_mpnets_padding_in_the_midst_of_a_text() -> None:
    """An id of padding that the mask calls real has a place, though the position of the padding."""
    model, inputs = stock("MPNet", ANSWERS), batch("right", (20, 20))
    inputs["input_ids"][:, 7] = 1
    expected = outputs(model, inputs)
    assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= 2e-5


@pytest.mark.skipif("triton" not in READY, reason="Triton's interpreter is off")
@pytest.mark.parametrize("stem", ["MPNet", "ModernBert"])
def test_families_by_position_run_on_triton(stem: str) -> None:
    """A text with holes in its mask, which is longer than a window; all ops are Triton's."""
    for model in (stock(stem, ANSWERS), pruned(family_named(stem).pruned_type, ANSWERS)):
        inputs = batch("holes", (9,))
        expected = outputs(model, inputs)
        with optimized(model) as fast, pruned_ops.use_backend("triton"), record() as ran:
            assert largest_difference(outputs(fast, inputs), expected) <= 2e-5
        assert {name for counts in ran.values() for name in counts} == {"triton"}
        assert ran["attention"]["triton"] == model.config.num_hidden_layers


def test_debertas_products_by_distance_are_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock("DebertaV2", "")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="embeddings of distances, which no kernel for a GPU does"):
        pruned_ops.optimize(model)


@pytest.mark.parametrize(("buckets", "farthest"), [(256, 512), (0, 40), (4, 9), (256, 300), (64, 2048)])
def test_debertas_distances_share_the_publishers_rows(buckets: int, farthest: int) -> None:
    """Ours count from the other end, by the key's distance from the query."""
    kind, away = Disentangled(True, True, buckets, farthest), torch.arange(-3 * farthest, 3 * farthest + 1)
    bucket = make_log_bucket_position(-away, buckets, farthest).long() if buckets else -away
    expected = (bucket + kind.span).clamp(0, kind.rows - 1)
    rows = kind.distance_rows.long()[away.clamp(-farthest, farthest) + farthest]
    assert torch.equal(kind.rows - 1 - rows, expected)


DEBERTAS: dict[str, dict[str, Any]] = {
    "positions and types": {"position_biased_input": True, "type_vocab_size": 2},
    "content to position": {"pos_att_type": "c2p"},
    "position to content": {"pos_att_type": ["p2c"], "norm_rel_ebd": "none"},
    "a row for each distance": {"position_buckets": -1, "max_relative_positions": 7},
    "as far as positions": {"max_relative_positions": -1, "position_buckets": 256, "vocab_size": 100,
                            "max_position_embeddings": 300},
    "no relative attention": {"relative_attention": False, "pos_att_type": None, "norm_rel_ebd": "none",
                              "position_biased_input": True},
}  # fmt: skip


@pytest.mark.parametrize("variant", DEBERTAS)
def test_debertas_options(variant: str) -> None:
    """Packed, and in our own padded class, whose parameters are the publisher's."""
    model, inputs = stock("DebertaV2", ANSWERS, **DEBERTAS[variant]), batch("holes", (60, 33, 4))
    inputs = typed(inputs) if "types" in variant else inputs
    expected = outputs(model, inputs)
    config = PRUNED_CONFIGS["pruned_deberta_v2"](**model.config.to_dict())
    ours = AutoModelForQuestionAnswering.from_config(config).eval()
    ours.load_state_dict(model.state_dict())
    assert largest_difference(outputs(ours, inputs), expected) <= 2e-5
    assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= 2e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conv_kernel_size": 3}, "conv_kernel_size is 3, and convolutions are not computed"),
        ({"share_att_key": False}, "share_att_key is False, only True is computed"),
        ({"pos_att_type": "p2p"}, r"pos_att_type is \['p2p'\], c2p or p2c is needed"),
        ({"relative_attention": False}, "pos_att_type is given without relative_attention"),
        ({"position_buckets": 7}, "position_buckets is 7, an even number from 4 on is needed"),
        ({"position_buckets": 32}, "position_buckets is 32, half of which has to be less than the farthest"),
        ({"embedding_size": 32}, "embedding_size is 32, only that of hidden_size"),
        ({"attention_head_size": 8}, "attention_head_size is 8, only hidden_size / num_attention_heads"),
        ({"pooler_hidden_act": "relu"}, "pooler_hidden_act is 'relu', only 'gelu' is computed"),
    ],
)
def test_debertas_that_are_not_computed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruned_ops.optimize(stock("DebertaV2", ANSWERS, **fields))


def test_debertas_texts_may_be_longer_than_its_positions() -> None:
    """Where there is no table of positions, nothing ends them; position_ids are not looked at."""
    model, inputs = stock("DebertaV2", TOKENS), batch("right", (130, 7))
    expected = outputs(model, inputs)
    inputs["position_ids"] = torch.full((2, 130), 999)
    assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= 2e-5


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 ties its dense layer to the words"
)
def test_debertas_head_for_words_that_is_not_legacy() -> None:
    model, inputs = stock("DebertaV2", "MaskedLM", legacy=False), batch("holes")
    expected = outputs(model, inputs)
    assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= 2e-5


def test_debertas_int8_checkpoint_gives_what_ran(tmp_path: Path) -> None:
    """The keys and queries of distances are made of int8 weights, too: the command compares all bits."""
    stock("DebertaV2", ANSWERS, pad_token_id=0, vocab_size=300).save_pretrained(tmp_path / "dense")
    word_tokenizer(24).save_pretrained(tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("\n".join(words(number) for number in range(3, 12)))
    texts = ["--texts", str(tmp_path / "texts.txt"), "--tolerance", "0.9"]
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "int8"), *texts]) == 0


def test_debertas_are_not_imported(tmp_path: Path) -> None:
    stock("DebertaV2", ANSWERS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a DeBERTa, of which no other tool's checkpoints are known"):
        pruned_ops.import_checkpoint(tmp_path)


def test_debertas_hidden_dimensions_need_a_norm_of_distances() -> None:
    with pytest.raises(ValueError, match="no LayerNorm makes its embeddings of distances; prune heads and"):
        attach(stock("DebertaV2", ANSWERS, norm_rel_ebd="none"), parts=["hidden"])
