"""Checkpoints that other tools pruned, taken in as pruned_ops checkpoints: same logits, structure written
down.

Recognised are BERT and RoBERTa question-answering checkpoints with: heads that transformers 4 pruned
(`pruned_heads` in the config; v5 cannot load them); zero rows, columns and heads (nn_pruning); layers that
are smaller than the config says, or missing, and a smaller hidden size (CoFi); masks beside a dense model
(TextPruner's mask.pt; head_mask.pt with ffn_mask.pt or neuron_mask.pt, as retraining-free pruning has them).
This is the one place where structure is inferred, from tensor sizes and from zeros.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from pruned_ops.checkpoints.foreign import Source, Tensors, activation_name, open_source, unpickled
from pruned_ops.models.modeling import answering_class
from pruned_ops.shape import MAX_WIDTH, LayerShape, checked_int

_LAYER = re.compile(r"^encoder\.layer\.(\d+)\.(.+)$")
_PARTS = {
    f"{name}.{kind}"
    for name in (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
    )
    for kind in ("weight", "bias")
}  # fmt: skip


def import_checkpoint(folder: str | Path, head_dim: int | None = None) -> Any:
    """The model that this foreign checkpoint holds, as a PrunedBert- or PrunedRobertaForQuestionAnswering, in
    fp32 and evaluation mode; `save_pretrained` keeps it.

    head_dim: a head's width, where it is not the config's hidden_size / num_attention_heads. Nothing is
    unpickled but tensors. Errors: OSError where files are missing; ValueError, saying what was recognised and
    what was not, for another layout.
    """
    return read_foreign(folder, head_dim)[0]


def read_foreign(folder: str | Path, head_dim: int | None = None) -> tuple[Any, list[str]]:
    """`import_checkpoint`'s model, and sentences on what was recognised."""
    source = open_source(Path(folder))
    layers = _layers(source)
    if head_dim is None:
        hidden, heads = source.config["hidden_size"], source.config["num_attention_heads"]
        head_dim = source.config.get("head_dim") or hidden // heads
        if source.config.get("head_dim") is None and hidden % heads:
            raise ValueError(
                f"{folder}: {heads} heads do not divide a hidden size of {hidden}: say a head's width "
                "(head_dim)"
            )
    head_dim = checked_int("head_dim", head_dim, 1, MAX_WIDTH)
    for number, layer in layers.items():
        _check_layer(source, number, layer, head_dim)
    _apply_masks(source, layers, head_dim)
    dropped = [_drop_dead(layer, head_dim, ACT2FN[activation_name(source)]) for layer in layers.values()]
    if any(map(sum, dropped)):
        heads, units = map(sum, zip(*dropped, strict=True))
        source.notes.append(f"{heads} heads and {units} FFN units without effect, left out")
    return _build(source, list(layers.values()), head_dim), source.notes


def _layers(source: Source) -> dict[int, Tensors]:
    """The tensors of each layer that is there, by its number."""
    layers: dict[int, Tensors] = {}
    for name in list(source.encoder):
        match = _LAYER.match(name)
        if match:
            layers.setdefault(int(match[1]), {})[match[2]] = source.encoder.pop(name)
    known = set(range(source.config["num_hidden_layers"]))
    if set(layers) - known:
        raise ValueError(
            f"{source.folder}: there are tensors of layer {max(layers)}, the config has {len(known)} layers"
        )
    # CoFi keeps the LayerNorms of a layer that is gone, and does not run them.
    layers = {number: layer for number, layer in layers.items() if not all("LayerNorm" in n for n in layer)}
    missing = sorted(known - set(layers))
    if missing:
        source.notes.append(f"layers {', '.join(map(str, missing))} are missing altogether")
    for number, layer in layers.items():
        odd = sorted(set(layer) ^ _PARTS)
        if odd:
            state = "lacks, or has besides" if set(layer) - _PARTS else "lacks"
            raise ValueError(
                f"{source.folder}: layer {number} {state} {', '.join(odd[:4])}; a layer must be there whole "
                "or not at all, because half of one would still normalise here (recognised: "
                f"{'; '.join(source.notes) or 'its other layers'})"
            )
    return dict(sorted(layers.items()))


def _check_layer(source: Source, number: int, layer: Tensors, head_dim: int) -> None:
    """Sizes that belong together agree; what is smaller than the config says is noted."""
    width, hidden = layer["attention.self.query.weight"].shape
    inner = layer["intermediate.dense.weight"].size(0)
    expected = {
        **{f"attention.self.{name}.weight": (width, hidden) for name in ("query", "key", "value")},
        **{f"attention.self.{name}.bias": (width,) for name in ("query", "key", "value")},
        "attention.output.dense.weight": (hidden, width), "attention.output.dense.bias": (hidden,),
        "intermediate.dense.weight": (inner, hidden), "intermediate.dense.bias": (inner,),
        "output.dense.weight": (hidden, inner), "output.dense.bias": (hidden,),
    }  # fmt: skip
    for name, shape in expected.items():
        if tuple(layer[name].shape) != shape:
            raise ValueError(
                f"{source.folder}: layer {number}'s {name} is {tuple(layer[name].shape)}, beside the others "
                f"{shape} is needed"
            )
    if width % head_dim:
        raise ValueError(
            f"{source.folder}: layer {number} has {width} rows of queries, no multiple of head_dim "
            f"{head_dim}: say a head's width (head_dim)"
        )
    recorded = source.config.get("pruned_heads") or {}
    pruned = len(recorded.get(str(number), []))
    heads, dense = width // head_dim, source.config["num_attention_heads"]
    if pruned and heads != dense - pruned:
        raise ValueError(
            f"{source.folder}: pruned_heads takes {pruned} of {dense} heads from layer {number}, its tensors "
            f"hold {heads}"
        )
    if heads != dense or inner != source.config["intermediate_size"]:
        why = ", as pruned_heads says" if pruned else ""
        source.notes.append(f"layer {number} has {heads} heads{why} and FFN width {inner}")


def _apply_masks(source: Source, layers: dict[int, Tensors], head_dim: int) -> None:
    """Masks beside a dense model multiply contexts and FFN activations: they are folded into the weights."""
    folder, found = source.folder, {}
    for name in ("zs.pt", "l0_module.pt"):
        if (folder / name).is_file() and not source.notes:
            raise ValueError(
                f"{folder} has {name} beside weights that are not narrowed: let CoFi prune them first "
                "(prune_model_with_z), then import what it saves"
            )
    if (folder / "mask.pt").is_file():  # TextPruner: (head mask, FFN mask)
        pair = unpickled(folder / "mask.pt")
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"{folder / 'mask.pt'} is no pair of masks")
        found = {"heads": pair[0], "ffn": pair[1]}
    for part, names in (("heads", ["head_mask.pt"]), ("ffn", ["ffn_mask.pt", "neuron_mask.pt"])):
        for path in (folder / name for name in names):
            if path.is_file():
                found[part] = unpickled(path)
    for part, mask in found.items():
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != len(layers):
            raise ValueError(f"{folder}: the mask of {part} is no matrix with a row for each layer")
        for row, layer in zip(mask.float(), layers.values(), strict=True):
            weight = layer["attention.output.dense.weight" if part == "heads" else "output.dense.weight"]
            factors = row.repeat_interleave(head_dim) if part == "heads" else row
            if len(factors) != weight.size(1):
                raise ValueError(
                    f"{folder}: the mask of {part} has {len(row)} columns, which a layer does not have"
                )
            weight.mul_(factors)
        source.notes.append(f"a mask of {part} beside the weights, folded into them")


def _drop_dead(layer: Tensors, head_dim: int, activation: Any) -> tuple[int, int]:
    """Leave out heads and FFN units without effect; what a constant one adds goes into the bias after it."""
    value, bias = layer["attention.self.value.weight"], layer["attention.self.value.bias"]
    after = layer["attention.output.dense.weight"]
    heads = len(value) // head_dim
    constant = value.reshape(heads, head_dim * value.size(1)).eq(0).all(1)
    dead = constant | after.reshape(len(after), heads, head_dim).eq(0).all(2).all(0)
    columns = dead.repeat_interleave(head_dim)
    # Attention's weights sum to 1: a head whose values are all its bias puts out that bias.
    added = after[:, columns].double() @ bias[columns].double()
    layer["attention.output.dense.bias"] += added.float()
    for name in ("query", "key", "value"):
        for kind in ("weight", "bias"):
            layer[f"attention.self.{name}.{kind}"] = layer[f"attention.self.{name}.{kind}"][~columns]
    layer["attention.output.dense.weight"] = after[:, ~columns]
    up, bias = layer["intermediate.dense.weight"], layer["intermediate.dense.bias"]
    down = layer["output.dense.weight"]
    gone = up.eq(0).all(1) | down.eq(0).all(0)
    added = down[:, gone].double() @ activation(bias[gone].double())
    layer["output.dense.bias"] += added.float()
    layer["intermediate.dense.weight"], layer["intermediate.dense.bias"] = up[~gone], bias[~gone]
    layer["output.dense.weight"] = down[:, ~gone]
    return int(dead.sum()), int(gone.sum())


def _build(source: Source, layers: list[Tensors], head_dim: int) -> Any:
    """The model, made without memory of its own, with the source's tensors put into it."""
    model_class = answering_class(source.kind)
    shapes = [
        LayerShape(len(x["attention.self.query.bias"]) // head_dim, len(x["intermediate.dense.bias"]))
        for x in layers
    ]
    table = source.encoder.get("embeddings.word_embeddings.weight")
    if table is None or table.dim() != 2:
        raise ValueError(f"{source.folder} has no word_embeddings")
    hidden = table.size(1)
    if hidden != source.config["hidden_size"]:
        source.notes.append(f"hidden size {hidden} of {source.config['hidden_size']}")
    fields = source.fields
    fields.update(hidden_size=hidden, num_hidden_layers=len(layers), head_dim=head_dim, layer_shapes=shapes)
    config = model_class.config_class(**fields)
    with torch.device("meta"):
        model = model_class(config)
    prefix = f"{model_class.base_model_prefix}."
    state = {prefix + name: tensor for name, tensor in source.encoder.items()} | source.head
    for number, layer in enumerate(layers):
        state |= {f"{prefix}encoder.layer.{number}.{name}": tensor for name, tensor in layer.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{source.folder}: {' '.join(str(error).split())[:400]}") from None
    return model.float().eval()
