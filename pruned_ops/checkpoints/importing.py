"""Checkpoints that other tools pruned, made into pruned_ops checkpoints: the logits stay, the structure is
written down.

Recognised are checkpoints of the known families, for question answering, sequence or token classification or
without a head, with: heads that transformers 4 pruned
(`pruned_heads` in the config; v5 cannot load them); zero rows, columns and heads (nn_pruning); layers that
are smaller than the config says, or missing, and a smaller hidden size (CoFi); masks beside a dense model
(TextPruner's mask.pt; head_mask.pt with ffn_mask.pt or neuron_mask.pt, as retraining-free pruning has them).
Nowhere else is structure inferred from tensor sizes and from zeros.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

from pruned_ops.checkpoints.foreign import CLASSIFIER, POOLER, Source, numbers_of, open_source
from pruned_ops.checkpoints.loading import check_weights
from pruned_ops.checkpoints.tensors import Tensors, unpickled
from pruned_ops.files import shown
from pruned_ops.models.families.description import LayerNames
from pruned_ops.models.heads import pruned_class
from pruned_ops.shape import MAX_WIDTH, LayerShape, checked_int

_PARTS = {f"{part.name}.{kind}" for part in fields(LayerNames) for kind in ("weight", "bias")}


def import_checkpoint(folder: str | Path, head_dim: int | None = None) -> Any:
    """The model that a foreign checkpoint holds, as a pruned model under the same head, in fp32 and in
    evaluation mode; `save_pretrained` keeps it.

    head_dim: a head's width, where it is not the config's hidden_size / num_attention_heads. Nothing but
    tensors is unpickled. Errors: OSError where files are missing; ValueError for another layout, which says
    what was recognised and what was not.
    """
    return read_foreign(folder, head_dim)[0]


def read_foreign(folder: str | Path, head_dim: int | None = None) -> tuple[Any, list[str]]:
    """The model that `import_checkpoint` gives, and sentences on what was recognised."""
    source = open_source(Path(folder))
    layers = _layers(source)
    head_dim = checked_int(
        f"{source.folder}: head_dim", source.head_dim if head_dim is None else head_dim, 1, MAX_WIDTH
    )
    for number, layer in layers.items():
        _check_layer(source, number, layer, head_dim)
    _fold_masks(source, layers, head_dim)
    _check_biases(source, layers, head_dim)
    dead = [_drop_dead(layer, head_dim, ACT2FN[source.activation]) for layer in layers.values()]
    source.heads = [[i for i, gone in enumerate(heads) if not gone] for heads, _ in dead]
    dropped = [(sum(heads), units) for heads, units in dead]
    if any(map(sum, dropped)):
        heads, units = map(sum, zip(*dropped, strict=True))
        source.notes.append(f"{heads} heads and {units} FFN units without effect, left out")
    return _build(source, list(layers.values()), head_dim), source.notes


def _check_biases(source: Source, layers: dict[int, Tensors], head_dim: int) -> None:
    """ValueError where a layer lacks heads, and heads have biases in a table that all layers share."""
    bias, dense = source.family.relative_bias, source.size("num_attention_heads")
    for number, layer in layers.items():
        if bias is not None and len(layer["query.bias"]) != dense * head_dim:
            raise ValueError(
                f"{source.folder}: layer {number} has fewer than {dense} heads, and nothing says which "
                f"columns of {bias.name} are theirs"
            )


def _layers(source: Source) -> dict[int, Tensors]:
    """Take the layers' tensors out of the source: for each layer that is there, by its number, its tensors
    under the names in _PARTS."""
    layers: dict[int, Tensors] = {}
    in_a_layer = re.compile(rf"^{re.escape(source.family.layers)}\.(0|[1-9][0-9]{{0,3}})\.(.+)$")
    for name in list(source.encoder):
        match = in_a_layer.match(name)
        if match:
            layer = layers.setdefault(int(match[1]), {})
            layer[source.family.layer.by_role(match[2])] = source.encoder.pop(name)
    known = set(range(source.size("num_hidden_layers")))
    if set(layers) - known:
        raise ValueError(
            f"{source.folder}: there are tensors of layer {max(layers)}, the config has {len(known)} layers"
        )
    # CoFi keeps the LayerNorms of a layer that is gone, and does not run them.
    layers = {number: layer for number, layer in layers.items() if not all("_norm." in n for n in layer)}
    missing = sorted(known - set(layers))
    if missing:
        source.notes.append(f"layers {', '.join(map(str, missing))} are missing altogether")
    for number, layer in layers.items():
        odd = sorted(source.family.layer.spelt(name) for name in set(layer) ^ _PARTS)
        if odd:
            state = "lacks, or has besides" if set(layer) - _PARTS else "lacks"
            raise ValueError(
                f"{source.folder}: layer {number} {state} {', '.join(odd[:4])}; a layer must be there whole "
                "or not at all, because half of one would still normalise here (recognised: "
                f"{'; '.join(source.notes) or 'its other layers'})"
            )
    return dict(sorted(layers.items()))


def _check_layer(source: Source, number: int, layer: Tensors, head_dim: int) -> None:
    """ValueError where a layer's sizes do not fit each other or the config's pruned_heads; a note where they
    are smaller than the config says."""
    width, hidden = layer["query.weight"].shape
    inner = layer["up.weight"].size(0)
    expected = {
        **{f"{name}.weight": (width, hidden) for name in ("query", "key", "value")},
        **{f"{name}.bias": (width,) for name in ("query", "key", "value")},
        "attention_output.weight": (hidden, width), "attention_output.bias": (hidden,),
        "up.weight": (inner, hidden), "up.bias": (inner,),
        "down.weight": (hidden, inner), "down.bias": (hidden,),
    }  # fmt: skip
    for name, shape in expected.items():
        actual, spelt = tuple(layer[name].shape), source.family.layer.spelt(name)
        if actual != shape:
            raise ValueError(
                f"{source.folder}: layer {number}'s {spelt} is {actual}, beside the others {shape} is needed"
            )
    if width % head_dim:
        raise ValueError(
            f"{source.folder}: layer {number} has {width} rows of queries, no multiple of head_dim "
            f"{head_dim}: say a head's width (head_dim)"
        )
    recorded = source.config.get("pruned_heads") or {}
    pruned = len(recorded.get(str(number), []))
    heads, dense = width // head_dim, source.size("num_attention_heads")
    if pruned and heads != dense - pruned:
        raise ValueError(
            f"{source.folder}: pruned_heads takes {pruned} of {dense} heads from layer {number}, its tensors "
            f"hold {heads}"
        )
    if heads != dense or inner != source.size("intermediate_size"):
        why = ", as pruned_heads says" if pruned else ""
        source.notes.append(f"layer {number} has {heads} heads{why} and FFN width {inner}")


def _fold_masks(source: Source, layers: dict[int, Tensors], head_dim: int) -> None:
    """Fold the masks beside a dense model, which multiply contexts and FFN activations, into the weights."""
    for part, mask in _masks(source).items():
        numbers = numbers_of(mask, f"{source.folder}: the mask of {part}")
        if numbers.dim() != 2 or len(numbers) != len(layers):
            raise ValueError(f"{source.folder}: the mask of {part} is no matrix with a row for each layer")
        for row, layer in zip(numbers, layers.values(), strict=True):
            weight = layer["attention_output.weight" if part == "heads" else "down.weight"]
            factors = row.repeat_interleave(head_dim) if part == "heads" else row
            if len(factors) != weight.size(1):
                raise ValueError(
                    f"{source.folder}: the mask of {part} has {len(row)} columns, which a layer does not have"
                )
            weight.mul_(factors)
        source.notes.append(f"a mask of {part} beside the weights, folded into them")


def _masks(source: Source) -> dict[str, Any]:
    """The masks of "heads" and "ffn" in the files beside the weights."""
    folder = source.folder
    is_narrowed = source.notes or _widths(source)[0] != source.size("hidden_size")
    for name in ("zs.pt", "l0_module.pt"):
        if (folder / name).is_file() and not is_narrowed:
            raise ValueError(
                f"{folder} has {name} beside weights that are not narrowed: let CoFi prune them first "
                "(prune_model_with_z), then import what it saves"
            )
    masks: dict[str, Any] = {}
    if (folder / "mask.pt").is_file():  # TextPruner's: (head mask, FFN mask)
        pair = unpickled(folder / "mask.pt")
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"{folder / 'mask.pt'} is no pair of masks")
        masks = {part: mask for part, mask in zip(("heads", "ffn"), pair, strict=True) if mask is not None}
    for name, part in (("head_mask.pt", "heads"), ("ffn_mask.pt", "ffn"), ("neuron_mask.pt", "ffn")):
        mask = unpickled(folder / name) if (folder / name).is_file() else None
        if mask is None:
            continue
        if part in masks:
            raise ValueError(f"{folder} has two masks of {part}, one of them in {name}: take one away")
        masks[part] = mask
    return masks


def _drop_dead(layer: Tensors, head_dim: int, activation: Any) -> tuple[list[bool], int]:
    """Leave out the heads and FFN units without effect; returns which heads, and how many units. The constant
    that one of them adds goes into the bias after it."""
    value, bias = layer["value.weight"], layer["value.bias"]
    after = layer["attention_output.weight"]
    heads = len(value) // head_dim
    constant = value.reshape(heads, head_dim * value.size(1)).eq(0).all(1)
    dead = constant | after.reshape(len(after), heads, head_dim).eq(0).all(2).all(0)
    columns = dead.repeat_interleave(head_dim)
    # The attention weights sum to 1, so a head whose values are all its bias puts out that bias.
    added = after[:, columns].double() @ bias[columns].double()
    layer["attention_output.bias"] += added.float()
    for name in ("query", "key", "value"):
        for kind in ("weight", "bias"):
            layer[f"{name}.{kind}"] = layer[f"{name}.{kind}"][~columns]
    layer["attention_output.weight"] = after[:, ~columns]
    up, bias = layer["up.weight"], layer["up.bias"]
    down = layer["down.weight"]
    gone = up.eq(0).all(1) | down.eq(0).all(0)
    added = down[:, gone].double() @ activation(bias[gone].double())
    layer["down.bias"] += added.float()
    layer["up.weight"], layer["up.bias"] = up[~gone], bias[~gone]
    layer["down.weight"] = down[:, ~gone]
    return dead.tolist(), int(gone.sum())


def _build(source: Source, layers: list[Tensors], head_dim: int) -> Any:
    """The model, made without memory of its own, with the source's tensors put into it."""
    model_class = pruned_class(source.head_name, source.kind)
    shapes = [LayerShape(len(x["query.bias"]) // head_dim, len(x["up.bias"])) for x in layers]
    hidden, embedding = _widths(source)
    if source.head_name == "" and "For" in source.architecture:
        source.notes.append(
            f"the head of a {shown(source.architecture)}, left out: the encoder alone is here"
        )
    if hidden != source.size("hidden_size"):
        source.notes.append(f"hidden size {hidden} of {source.size('hidden_size')}")
    described = {
        **source.fields,
        **{"hidden_size": hidden, "num_hidden_layers": len(layers)},
        **{"head_dim": head_dim, "layer_shapes": shapes},
        **({} if source.family.projection is None else {"embedding_size": embedding}),
        **({} if source.family.relative_bias is None else {"head_indices": source.heads}),
        **_head_sizes(source, hidden),
    }
    has_head, pooled = source.head_name != "", POOLER[0] in source.encoder
    try:
        config = model_class.config_class(**described)
        with torch.device("meta"):
            model = model_class(config) if has_head else model_class(config, add_pooling_layer=pooled)
    except Exception as error:  # transformers has its own kinds for fields of a wrong type
        raise ValueError(f"{source.folder / 'config.json'}: {' '.join(str(error).split())[:400]}") from None
    prefix = f"{model_class.base_model_prefix}." if has_head else ""
    state = {prefix + name: tensor for name, tensor in source.encoder.items()} | source.head
    for number, layer in enumerate(layers):
        within = f"{prefix}{source.family.layers}.{number}."
        state |= {within + source.family.layer.spelt(name): tensor for name, tensor in layer.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{source.folder}: {' '.join(str(error).split())[:400]}") from None
    try:
        check_weights(model.named_parameters())  # a mask or a constant may have made them so
    except ValueError as error:
        raise ValueError(f"{source.folder}: {error}") from None
    return model.float().eval()


def _widths(source: Source) -> tuple[int, int]:
    """The widths of the hidden states and of the embedding's tables."""
    family = source.family
    table = source.encoder.get(f"embeddings.{family.embeddings.words}.weight")
    if table is None or table.dim() != 2:
        raise ValueError(f"{source.folder} has no {family.embeddings.words}")
    projection = source.encoder.get(f"{family.projection}.weight")
    return table.size(1) if projection is None else len(projection), table.size(1)


def _head_sizes(source: Source, hidden: int) -> dict[str, int]:
    """The config's fields that the head's tensors give. (CoFi takes columns of the first linear on top of a
    narrower encoder, and leaves its rows.)"""
    sizes = {}
    names = source.family.text_head
    first = source.encoder.get(POOLER[0], source.head.get(f"{names.first}.weight"))
    if first is not None and first.dim() == 2 and first.size(0) != hidden:
        sizes["pooler_size"] = first.size(0)
    last = source.head.get(f"{names.last}.weight", source.head.get(CLASSIFIER[0]))
    if last is not None and last.dim() == 2 and "id2label" not in source.config:
        sizes["num_labels"] = last.size(0)
    return sizes
