"""optimize and restore: packed is padded, only real tokens are computed, and traced code does the same."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertModel

import pruned_ops
from calls import TwoTowers
from counting import CustomHead, RowCounter
from head_models import stock as stock_classifier
from inputs import MODELS, READY, logits, padded_batch, pruned_model, shake, stock_model
from pruned_ops import LayerShape
from pruned_ops.models.encoder import PrunedPreTrainedModel
from pruned_ops.ops.registry import BACKENDS, OPS, record, use_backend
from pruned_ops.runtime.optimize import optimized
from pruned_ops.runtime.packed_encoder import OptimisedEncoder
from thorough import only_in_test_all

# transformers 4 hands no argument of a model on to its encoder, and so no request for a head on packed rows.
needs_heads = pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4 has no way to the rows"
)


@pytest.mark.parametrize("backend", READY)
def test_packed_is_padded(model: Any, backend: str) -> None:
    interpreted = backend in BACKENDS and BACKENDS[backend].on_demand
    batch = padded_batch((7, 3, 4, 0, 1) if interpreted else LENGTHS[0], model.config.pad_token_id)
    real = batch["attention_mask"].bool()
    expected = logits(model, batch)
    assert expected[real].std() > 0.1  # a model whose outputs are all alike would prove nothing
    with use_backend(backend), record() as ran:
        found = logits(pruned_ops.optimize(model), batch)
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=1e-5)
    assert (found[~real] == torch.finfo(torch.float32).min).all()
    assert {name for counts in ran.values() for name in counts} == {backend}
    has_it = "cpu" in READY and backend in ("reference", *OPS["encoder"].kernels)
    assert ("encoder" if has_it else "attention") in ran


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_packed_is_padded_on_a_gpu(model: Any) -> None:
    batch = {
        name: tensor.cuda() for name, tensor in padded_batch(pad_token_id=model.config.pad_token_id).items()
    }
    real = batch["attention_mask"].bool()
    expected = logits(model.cuda(), batch)
    found = logits(pruned_ops.optimize(model), batch)
    torch.testing.assert_close(found[real], expected[real], atol=1e-3, rtol=1e-3)
    assert found.is_cuda and (found[~real] == torch.finfo(torch.float32).min).all()
    pruned_ops.restore(model)
    assert {p.device.type for p in model.parameters()} == {"cuda"}


def test_a_sequence_alone_is_the_same_in_a_batch(model: Any) -> None:
    batch = padded_batch((20, 3, 11), model.config.pad_token_id)
    fast = pruned_ops.optimize(model)
    together = logits(fast, batch)
    for row, length in enumerate((20, 3, 11)):
        alone = logits(fast, {name: tensor[row : row + 1, :length] for name, tensor in batch.items()})
        torch.testing.assert_close(together[row : row + 1, :length], alone, atol=1e-5, rtol=1e-5)


def test_only_real_tokens_are_computed(model: Any) -> None:
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    encoder = pruned_ops.optimize(model).base_model
    with torch.no_grad(), RowCounter() as counter:
        encoder(**batch)
    # Four linear layers in each: q|k|v, attention output, FFN up, FFN down.
    assert len(counter.rows) == 4 * model.config.num_hidden_layers
    assert {rows for _, rows in counter.rows} == {int(batch["attention_mask"].sum())}


@needs_heads
@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta", "Camembert"])
def test_the_vocabulary_is_scored_for_real_tokens_alone(family: str) -> None:
    """Its linear is the largest of a SparseEncoder: a padded row would cost as much as many layers."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    plain = shake(getattr(transformers, f"{family}ForMaskedLM")(config).eval(), 0)
    fast = pruned_ops.optimize(copy.deepcopy(plain))
    mask = (torch.arange(9) < torch.tensor([9, 2, 0, 5])[:, None]).long()
    ids = torch.randint(2, 50, mask.shape, generator=torch.Generator().manual_seed(0)) * mask + 1 - mask
    with torch.no_grad(), RowCounter() as counter:
        found = fast(ids, attention_mask=mask).logits
    assert {rows for _, rows in counter.rows if rows} == {int(mask.sum())}
    assert not found[mask == 0].any()
    seen: list[torch.Size] = []
    fast.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[2].shape))
    with torch.no_grad():
        hooked, expected = (model(ids, attention_mask=mask).logits for model in (fast, plain))
    assert seen == [expected.shape]  # a hook of the caller's sees what it saw before
    for logits_found in (found, hooked):
        torch.testing.assert_close(logits_found[mask == 1], expected[mask == 1], atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="does not take labels"):
        fast(ids, attention_mask=mask, labels=ids)


@pytest.mark.parametrize("holes", ["left", "holes", "bool", "float", "none"])
def test_other_masks(model: Any, holes: str) -> None:
    batch = padded_batch((20, 20, 20), model.config.pad_token_id)
    mask = batch["attention_mask"]
    if holes == "left":
        mask[0, :7] = 0
    elif holes == "holes":
        mask[1, 3:6] = mask[1, 15] = 0
    elif holes != "none":
        mask[2, 9:] = 0
    batch["attention_mask"] = mask.bool() if holes == "bool" else mask.float() if holes == "float" else mask
    real = mask.bool()
    reference = {**batch, "attention_mask": mask}
    if holes == "none":
        del batch["attention_mask"]
    expected = logits(model, reference)
    torch.testing.assert_close(
        logits(pruned_ops.optimize(model), batch)[real], expected[real], atol=2e-5, rtol=1e-5
    )


def test_position_and_token_type_ids(model: Any) -> None:
    batch = padded_batch((9, 4), model.config.pad_token_id)
    batch["position_ids"] = torch.arange(2, 11).flip(0).expand(2, 9).contiguous()
    if model.config.type_vocab_size > 1:
        batch["token_type_ids"] = (torch.arange(9) > 4).long().expand(2, 9)
    real = batch["attention_mask"].bool()
    expected = logits(model, batch)
    torch.testing.assert_close(
        logits(pruned_ops.optimize(model), batch)[real], expected[real], atol=2e-5, rtol=1e-5
    )


def test_hidden_states_are_zero_at_padding(model: Any) -> None:
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True).hidden_states
        found = pruned_ops.optimize(model)(**batch, output_hidden_states=True).hidden_states
    assert len(found) == model.config.num_hidden_layers + 1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=2e-5, rtol=1e-5)
        assert (ours[~real] == 0).all()


def test_tuples_and_positional_arguments(model: Any) -> None:
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    expected = logits(pruned_ops.optimize(model), batch)
    with torch.no_grad():
        found = model(batch["input_ids"], batch["attention_mask"], return_dict=False)
    assert isinstance(found, tuple) and torch.equal(torch.stack(found, -1), expected)


def test_restore_undoes(model: Any) -> None:
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    before = logits(model, batch)
    parameters = [(id(p), p.requires_grad) for p in model.parameters()]
    pruned_ops.optimize(model)
    assert pruned_ops.optimize(model) is model  # twice is once
    pruned_ops.restore(model)
    assert [(id(p), p.requires_grad) for p in model.parameters()] == parameters
    assert all(p.is_contiguous() for p in model.parameters())  # else it may not be saved
    assert torch.equal(logits(model, batch), before)
    model.train()(**batch).start_logits.sum().backward()
    queries = [p for name, p in model.named_parameters() if "query.weight" in name and p.numel()]
    assert queries and all(p.grad is not None for p in queries)


def test_restore_gives_back_the_mode(model: Any) -> None:
    model.train()
    model.base_model.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert not pruned_ops.optimize(model).training
    assert {name: module.training for name, module in pruned_ops.restore(model).named_modules()} == before


def test_restore_keeps_the_dtype_used_last(model: Any) -> None:
    pruned_ops.optimize(model).double()
    pruned_ops.restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_optimized_is_a_block(model: Any) -> None:
    with optimized(model) as fast:
        assert isinstance(fast.base_model, OptimisedEncoder)
    assert not isinstance(model.base_model, OptimisedEncoder) and not model.training


def test_a_block_for_a_model_of_which_a_part_is_optimised_is_refused() -> None:
    towers = TwoTowers().eval()
    pruned_ops.optimize(towers.passage)
    with pytest.raises(ValueError, match="a part of this TwoTowers is optimised"), optimized(towers):
        pass
    assert [isinstance(tower, OptimisedEncoder) for tower in towers.children()] == [False, True]
    pruned_ops.optimize(towers.query)
    with optimized(towers) as fast:
        assert fast is towers
    assert all(isinstance(tower, OptimisedEncoder) for tower in towers.children())


def test_restore_frees_what_was_laid_out_at_once(model: Any) -> None:
    """Not when Python's collector runs."""
    pruned_ops.optimize(model)
    packed, engine = weakref.ref(model.base_model.packed), weakref.ref(model.engine)
    collects = gc.isenabled()
    gc.disable()
    try:
        pruned_ops.restore(model)
        assert packed() is None and engine() is None
    finally:
        if collects:
            gc.enable()


def test_a_block_in_another_dtype_is_refused_and_one_in_none_stays_as_it_is(model: Any) -> None:
    with optimized(model):
        with pytest.raises(ValueError, match="optimised already, in another dtype"), optimized(model, "int8"):
            pass
        with optimized(model) as fast:
            assert fast is model
        assert isinstance(model.base_model, OptimisedEncoder)
    assert not isinstance(model.base_model, OptimisedEncoder)


def test_no_weight_is_kept_twice(model: Any) -> None:
    """What the runtime's layout holds, the model's own weights hold no more, and read as it all the same;
    `restore` gives them back."""
    names = [name for name, one in model.named_parameters() if ".encoder.layer." in name and one.dim() == 2]
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    parameters = [model.get_parameter(name) for name in names]
    packed = pruned_ops.optimize(model).base_model.packed.encoder.runs_in_one_call
    assert packed == ("cpu" in READY)
    for name, parameter in zip(names, parameters, strict=True):
        assert parameter.shape == before[name].shape and torch.equal(parameter, before[name])
        if packed or any(part in name for part in ("query", "key", "value")):
            assert parameter.untyped_storage().nbytes() == 4 * bool(parameter.numel())
    if packed:
        for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            linears = [linear for part in one.base_model.packed.encoder.parts for linear in part.linears]
            sizes = [linear.weight.untyped_storage().nbytes() for linear in linears]
            assert sizes == [4 * bool(linear.weight.numel()) for linear in linears]
    model = pruned_ops.restore(model)
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in names)
    assert {type(parameter) for parameter in model.parameters()} == {torch.nn.Parameter}


def test_a_custom_head_and_a_pooler() -> None:
    encoder = BertModel(stock_model().config).eval()
    batch = padded_batch((9, 4))
    with torch.no_grad():
        pooled = encoder(**batch).pooler_output
    custom = CustomHead(encoder).eval()
    with torch.no_grad():
        expected = custom(**batch)
        torch.testing.assert_close(pruned_ops.optimize(custom)(**batch), expected, atol=2e-5, rtol=1e-5)
        found = custom.inner["encoder"](**batch).pooler_output
    torch.testing.assert_close(found, pooled, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["engine", "encode_many"])
def test_a_model_keeps_what_it_calls_as_we_do(name: str) -> None:
    model, ids = torch.nn.Module(), torch.tensor([[5, 6, 7]])
    setattr(model, name, BertModel(stock_model().config).eval())
    encoder = getattr(model, name)
    with torch.no_grad():
        expected = encoder(ids).last_hidden_state
        assert getattr(pruned_ops.optimize(model), name) is encoder
        torch.testing.assert_close(encoder(ids).last_hidden_state, expected, atol=2e-5, rtol=1e-5)
    assert isinstance(encoder, OptimisedEncoder)
    assert getattr(pruned_ops.restore(model), name) is encoder and type(encoder) is BertModel


def test_a_bare_encoder() -> None:
    encoder = BertModel(stock_model().config).eval()
    batch = padded_batch((9, 4))
    with torch.no_grad():
        expected = encoder(**batch).last_hidden_state
        fast = pruned_ops.optimize(encoder)
        found = fast(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=1e-5)
    assert pruned_ops.restore(fast) is encoder


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu_new"])
def test_other_activations(activation: str) -> None:
    model = stock_model(hidden_act=activation)
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    expected = logits(model, batch)
    torch.testing.assert_close(
        logits(pruned_ops.optimize(model), batch)[real], expected[real], atol=2e-5, rtol=1e-5
    )


def test_every_op_is_used() -> None:
    """A layer that quietly went around the ops would run on no backend."""
    model = pruned_ops.optimize(stock_model())
    model.base_model.packed.encoder.unpack()
    with record() as ran:
        logits(model, padded_batch())
    # add_layer_norm is inside linear_add_layer_norm; BERT's FFNs have no gate.
    assert set(ran) == set(OPS) - {"add_layer_norm", "encoder", "linear_geglu"}
    assert ran["attention"].total() == 3 and ran["linear_add_layer_norm"].total() == 6


@pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")
def test_the_layers_run_in_one_call(model: Any) -> None:
    """Hidden states layer by layer are the same bits; a moved model is packed again, with its new weights."""
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    encoder = pruned_ops.optimize(model).base_model
    with torch.no_grad(), record() as ran:
        whole = encoder(**batch)
    assert ran == {"embed_layer_norm": {"cpu": 1}, "encoder": {"cpu": 1}}
    with torch.no_grad():
        by_layer = encoder(**batch, output_hidden_states=True)
    assert torch.equal(whole.last_hidden_state, by_layer.hidden_states[-1])
    half = copy.deepcopy(encoder).half()
    assert not half.packed.encoder.runs_in_one_call
    assert half.float().packed.encoder.runs_in_one_call
    with torch.no_grad():
        again = half(**batch).last_hidden_state
    assert not torch.equal(again, whole.last_hidden_state)  # rounded to half on the way
    torch.testing.assert_close(again, whole.last_hidden_state, atol=0.05, rtol=0.05)


# The files of the project that a forward passes on a CPU, beside the backend's own.
PATH = {
    "runtime/packed_heads.py",
    "runtime/packed_encoder.py",
    "models/inputs.py",
    "models/families/known.py",
    "models/families/description.py",
    "layers/packing.py",
    "layers/modules.py",
    "layers/weights.py",
    "ops/registry.py",
}


def test_a_forward_passes_nine_files(model: Any) -> None:
    """A pruned model's own file is the tenth. On a CPU no engine is visited."""
    fast = pruned_ops.optimize(model)
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    logits(fast, batch)
    root = Path(pruned_ops.__file__).parent
    visited: set[Path] = set()
    sys.setprofile(lambda frame, event, argument: visited.add(Path(frame.f_code.co_filename)))
    try:
        logits(fast, batch)
    finally:
        sys.setprofile(None)
    files = {path.relative_to(root).as_posix() for path in visited if path.is_relative_to(root)}
    backend = {"ops/backends/cpu.py", "ops/reference.py"}
    assert "ops/registry.py" in files and "runtime/packed_heads.py" in files
    own = {"models/heads.py"} if isinstance(model, PrunedPreTrainedModel) else set()
    assert files - backend <= PATH | own and "runtime/engine.py" not in files


# What torch.export and torch.compile trace.
DYNAMIC = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
# The batch that is traced; then others, two with nothing padded.
LENGTHS = [(20, 3, 11, 0, 1), (7, 40), (9, 9, 9), (0, 5), (77,)]


def made(kind: str, optimised: bool) -> Any:
    model = MODELS[kind]()
    return pruned_ops.optimize(model) if optimised else model


def exported(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        return torch.export.export(model, (), batch, dynamic_shapes=dict.fromkeys(batch, DYNAMIC))


def check(traced: Any, model: Any, some: list[tuple[int, ...]]) -> None:
    for seed, lengths in enumerate(some):
        batch = padded_batch(lengths, model.config.pad_token_id, seed)
        real = batch["attention_mask"].bool()
        found, expected = logits(traced, batch), logits(model, batch)
        torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=2e-5)


# Without us a stock model is only transformers'. An optimised pruned BERT is exported below, too.
@pytest.mark.parametrize(
    ("kind", "optimised"),
    [
        ("stock-bert", True),
        ("stock-roberta", True),
        ("pruned-bert", False),
        ("pruned-roberta", True),
        pytest.param("pruned-bert", True, marks=only_in_test_all),
        pytest.param("pruned-roberta", False, marks=only_in_test_all),
    ],
)
def test_export(kind: str, optimised: bool, tmp_path: Path) -> None:
    """Saved and loaded again, too."""
    model = made(kind, optimised)
    program = exported(model, padded_batch(LENGTHS[0], model.config.pad_token_id))
    torch.export.save(program, tmp_path / "model.pt2")
    check(torch.export.load(tmp_path / "model.pt2").module(), model, LENGTHS)


@pytest.mark.parametrize("way", ["export", "compile"])
def test_a_traced_classifier(way: str) -> None:
    """A label for each text is read from its first token: BERT's through its pooler, RoBERTa's without one.
    Texts of other numbers and lengths than those that were traced, one without a token among them."""
    model = pruned_ops.optimize(stock_classifier("bert" if way == "export" else "roberta", "sequence"))
    pad = model.config.pad_token_id
    torch._dynamo.reset()
    if way == "export":
        traced = exported(model, padded_batch(LENGTHS[0], pad)).module()
    else:
        traced = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, lengths in enumerate(LENGTHS[:3]):
        batch = padded_batch(lengths, pad, seed)
        with torch.no_grad(), record() as ran:
            found, expected = traced(**batch).logits, model(**batch).logits
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
        assert found.shape == (len(lengths), 3) and sum(ran["embed_layer_norm"].values()) == 2


@pytest.mark.parametrize("optimised", [False, True], ids=["padded", "optimised"])
def test_compile_in_one_graph(optimised: bool) -> None:
    """The models are small, because tracing is slow."""
    model = pruned_model("roberta" if optimised else "bert", [LayerShape(2, 24), LayerShape(0, 0)])
    model = pruned_ops.optimize(model) if optimised else model
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    check(compiled, model, LENGTHS[:3])


@pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")
def test_traced_code_runs_our_kernels_on_real_tokens_only() -> None:
    """It looks at the mask's values, too, as the model itself does."""
    model = made("pruned-bert", True)
    batch = padded_batch((9, 4))
    traced = exported(model, batch).module()
    with record() as ran:
        logits(traced, batch)
    assert ran == {"embed_layer_norm": {"cpu": 1}, "encoder": {"cpu": 1}}
    with RowCounter() as counter:
        logits(traced, batch)
    assert {rows for name, rows in counter.rows if name == "encoder"} == {13}
    batch["attention_mask"].zero_()
    assert (logits(traced, batch) == torch.finfo(torch.float32).min).all()
    batch["attention_mask"].fill_(2)
    with pytest.raises(RuntimeError, match="attention_mask holds values other than 0 and 1"):
        traced(**batch)


def test_hidden_states_of_a_text_are_the_same_bits_in_every_batch() -> None:
    """The kernels sum each row in one order, whatever rows lie beside it."""
    fast = pruned_ops.optimize(stock_model())
    ids = torch.randint(5, 60, (6, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        alone = torch.cat([fast.base_model(input_ids=row[None])[0] for row in ids])
        for size in (2, 3, 6):
            assert torch.equal(fast.base_model(input_ids=ids[:size])[0], alone[:size])
