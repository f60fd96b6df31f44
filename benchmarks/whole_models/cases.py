"""What bench_models.py measures: the models (checkpoints, or random ones of a size) and their batches."""

from __future__ import annotations

import fnmatch
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForQuestionAnswering

from pruned_ops import LayerShape
from pruned_ops.checkpoints import export
from pruned_ops.checkpoints.loading import check_source, load_model, load_tokenizer, supported_config
from pruned_ops.measure.timing import Workload
from pruned_ops.models.configuration import PRUNED_CONFIGS
from pruned_ops.models.families.known import family_of
from pruned_trainer.tasks.squad.examples import load_squad
from pruned_trainer.tasks.squad.task import Questions
from pruned_trainer.training.teacher_cache import weights_content
from rivals.rival import Batch, Logits, Run

# Fields of the configs for --random: MiniLM-L6, BERT-base and BERT-large, and the base sizes of families
# whose layers are not BERT's, by their model types. (Their vocabularies are BERT's: words cost no time.)
_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SIZES: dict[str, dict[str, Any]] = {
    "minilm": dict(zip(_FIELDS, (384, 6, 12, 1536), strict=True)),
    "base": dict(zip(_FIELDS, (768, 12, 12, 3072), strict=True)),
    "large": dict(zip(_FIELDS, (1024, 24, 16, 4096), strict=True)),
    "mpnet": dict(zip(_FIELDS, (768, 12, 12, 3072), strict=True)) | {"max_position_embeddings": 514},
    "modernbert": dict(zip(_FIELDS, (768, 22, 12, 1152), strict=True))
    | {"vocab_size": 30522, "pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102}
    | {"bos_token_id": 101, "eos_token_id": 102},
    "deberta-v2": dict(zip(_FIELDS, (768, 12, 12, 3072), strict=True))
    | {"vocab_size": 30522, "relative_attention": True, "position_buckets": 256, "share_att_key": True}
    | {"pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "position_biased_input": False},
}
# The share of the FFN units that the pruned twin keeps, where it is not half. It keeps half of the heads.
FFN_KEPT = {"large": 0.45}
# FFN widths are multiples of this, as `--align` makes them, where the FFN is not tiny.
FFN_UNIT = 16
# Sequences a round: enough batches for a stable sum, few enough for a round of seconds.
SEQUENCES = {1: 48, 8: 128, 32: 256}
FIXED = {1: (128,), 8: (128, 384), 32: ()}
LONG = 4096
# Where no file is given: lengths of eight windows of a SQuAD file in arrival order, mean 175.
SQUAD_LIKE = (63, 118, 131, 149, 164, 187, 222, 366)
# A batch of several lengths and one of one: every runner's logits are checked on them before it is timed.
SAMPLES = Workload("samples", ((37, 128, 5, 90), (64,)))


@dataclass(frozen=True)
class Source:
    """Where the models come from: checkpoints, or a name of SIZES; and which of the two are wanted."""

    dense: str
    pruned: str
    random: str | None = None
    wanted: tuple[str, ...] = ("dense", "pruned")

    def __post_init__(self) -> None:
        """OSError where a checkpoint is not there, before minutes go into the other one."""
        for name in self.names if self.random is None else ():
            check_source(self.checkpoint(name))

    def checkpoint(self, name: str) -> str:
        """The folder or hub name of one of `names`."""
        return {"dense": self.dense, "pruned": self.pruned}[name]

    @property
    def names(self) -> tuple[str, ...]:
        there = ("dense", "pruned") if self.random or self.pruned != "none" else ("dense",)
        return tuple(name for name in there if name in self.wanted)

    @property
    def config(self) -> Any:
        """The dense model's config."""
        return random_config(self.random) if self.random else supported_config(self.dense)

    def load(self, name: str, device: str) -> Any:
        """The model of one of `names`, in evaluation mode."""
        if self.random is None:
            model: Any = load_model(self.checkpoint(name))
        else:
            model = random_model(self.random, pruned=name == "pruned")
        return nn.Module.to(model, device)


def half_shapes(layers: int, heads: int, ffn: int, ffn_kept: float = 0.5) -> list[LayerShape]:
    """Half of all heads and a share of all FFN units, spread unevenly as pruning does it.

    Layers 2i and 2i + 1 are as far above the mean as below it, by 1, 2 or 3 steps (a head; a twelfth of the
    dense FFN width). Errors: ValueError for sizes that cannot be cut so."""
    if layers % 2 or heads % 2 or ffn < 12 or heads < 6:
        raise ValueError(f"{layers} layers of {heads} heads and {ffn} FFN units cannot be halved in steps")
    unit = FFN_UNIT if ffn >= 12 * FFN_UNIT else 1
    mean, step = (int(width) // unit * unit for width in (ffn * ffn_kept, ffn / 12))
    shapes = []
    for i in range(layers):
        steps = (1 + i // 2 % 3) * (1 if i % 2 == 0 else -1)
        shapes.append(LayerShape(heads // 2 + steps, mean - steps * step))
    return shapes


def random_config(name: str) -> Any:
    """The config of a name of SIZES, which is a model type or else a size of BERT."""
    return AutoConfig.for_model(name if name in CONFIG_MAPPING else "bert", **SIZES[name])


def random_model(name: str, pruned: bool) -> Any:
    """A randomly initialised question-answering model of a name of SIZES, or one with half its heads and a
    share of its FFN units (FFN_KEPT)."""
    torch.manual_seed(0)
    config, sizes = random_config(name), SIZES[name]
    if not pruned:
        return AutoModelForQuestionAnswering.from_config(config).eval()
    names = ("num_hidden_layers", "num_attention_heads", "intermediate_size")
    shapes = half_shapes(*(sizes[key] for key in names), FFN_KEPT.get(name, 0.5))
    family = family_of(config)
    more: dict[str, Any] = {}
    if family.relative_bias is not None:
        more["head_indices"] = [list(range(shape.num_heads)) for shape in shapes]
    narrow = PRUNED_CONFIGS[config.model_type](layer_shapes=shapes, **more, **sizes)
    return AutoModelForQuestionAnswering.from_config(narrow).eval()


def arrival_lengths(data: Path, tokenizer: str) -> list[int]:
    """Lengths of a SQuAD file's windows (384 tokens, stride 128) in arrival order."""
    return Questions.cut(load_squad(data).examples, load_tokenizer(tokenizer), 384, 128).arrival_lengths()


def workloads(lengths: list[int] | None, quick: bool, patterns: list[str], longest: int) -> list[Workload]:
    """The workloads whose names match a pattern, of these: arrival order where lengths are given, and fixed
    lengths, with one text of LONG tokens for a model that takes up to `longest`.

    Errors: ValueError for a pattern that matches none."""
    known = []
    for batch_size, sequences in SEQUENCES.items():
        batches = max(1, sequences // batch_size // (8 if quick else 1))
        if lengths is not None:
            known.append(Workload.arrival_order(lengths, batch_size, batches))
        known += [Workload.fixed(length, batch_size, max(1, batches // 4)) for length in FIXED[batch_size]]
    if longest >= LONG:
        known.append(Workload.fixed(LONG, 1, 1))
    return matching(known, patterns)


def goal_workloads(lengths: list[int] | None, quick: bool, patterns: list[str]) -> list[Workload]:
    """The workloads that the GPU's goals are stated for and whose names match a pattern: fixed lengths;
    lengths spread evenly from 48 to 384; and a file's lengths (or, without one, lengths like SQuAD's), sorted
    as an offline job would sort them.

    quick: a quarter of the larger batches. Errors: ValueError for a pattern that matches none."""
    known = []
    for batch_size in (1, 8, 32, 128):
        sequences = max(1, batch_size // 4) if quick else batch_size
        fixed = (128, 384) if batch_size <= 8 else (384,)
        known += [Workload.fixed(length, sequences, 1) for length in fixed]
    spread = 8 if quick else 32
    shuffled = random.Random(0).sample(range(spread), spread)
    mixed = tuple(48 + (384 - 48) * place // (spread - 1) for place in shuffled)
    known.insert(-1, Workload(f"lengths48-384-b{spread}", (mixed,)))
    falling = sorted((lengths or [*SQUAD_LIKE] * 64)[: 64 if quick else 512], reverse=True)
    batches = [tuple(falling[first : first + 32]) for first in range(0, len(falling), 32)]
    known.append(Workload("offline-sorted-b32", tuple(batches)))
    return matching(known, patterns)


def matching(known: list[Workload], patterns: list[str]) -> list[Workload]:
    """The workloads whose name matches one of the patterns, in the order of the patterns: time may run out.
    Errors: ValueError for a pattern that matches none."""
    chosen: dict[str, Workload] = {}
    for pattern in patterns:
        named = {w.name: w for w in known if fnmatch.fnmatch(w.name, pattern)}
        if not named:
            names = ", ".join(workload.name for workload in known)
            raise ValueError(f"there is no workload {pattern!r}; there are: {names}")
        chosen |= named  # one that was there keeps its place
    return list(chosen.values())


def padded_to(run: Run, length: int, pad_token_id: int) -> Run:
    """A runner that first pads every batch to `length`, as a service of fixed length would; its logits have
    the batch's own length again."""

    def padded(batch: Batch) -> Logits:
        seqlen = batch["input_ids"].size(1)
        more = (0, length - seqlen)
        ids, mask = F.pad(batch["input_ids"], more, value=pad_token_id), F.pad(batch["attention_mask"], more)
        return tuple(logits[:, :seqlen] for logits in run({"input_ids": ids, "attention_mask": mask}))

    return padded


def fingerprint(model: Any) -> str:
    """A name for exactly these weights, this config, this torch and this exporter, for files kept between
    runs."""
    digest = hashlib.sha256(torch.__version__.encode())
    exporter = Path(export.__file__)
    graph = sorted(exporter.parent.glob("onnx_*.py"))  # which need onnx, where they are imported
    for path in (exporter, *graph):
        digest.update(path.read_bytes())
    digest.update(model.config.to_json_string(use_diff=False).encode())
    for content in weights_content(model):
        digest.update(content)
    return digest.hexdigest()[:16]
