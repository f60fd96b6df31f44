"""A checkpoint with fewer pieces in its vocabulary: the tokenizer, the rows of its tables, and the config;
`pruned-ops trim-vocabulary`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pruned_ops.checkpoints.loading import (
    ENCODER_SETTINGS,
    VOCABULARY_FILES,
    checkpoint_folder,
    load_config,
    load_tokenizer,
    read_config,
)
from pruned_ops.checkpoints.sentence_folder import MODULES, SETTINGS, Reading, inner_folder, modules_of
from pruned_ops.checkpoints.tensors import Tensors, read_tensors
from pruned_ops.checkpoints.trimmed_texts import BATCH, Agreement, Comparison, batches, check_texts
from pruned_ops.checkpoints.vocabulary import Trimmed, Vocabulary
from pruned_ops.files import check_new_folder, is_hidden, new_folder, read_json, read_text, shown, write_json
from pruned_ops.models.families.description import Family
from pruned_ops.models.families.known import BY_TYPE
from pruned_ops.shape import checked_int

# What a folder may hold beside config, weights and vocabulary, and what stays true of the trimmed model.
_TAKEN = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", MODULES, "README.md",
    SETTINGS, *ENCODER_SETTINGS, "LICENSE", "LICENSE.txt",
)  # fmt: skip
# The modules of sentence-transformers that do not know the vocabulary.
_MODULES = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")
# What is said at the end of a model card that is taken along.
_NOTE = """
## Trimmed vocabulary

pruned_ops kept {:,} of the {:,} rows of the word embedding. Texts whose pieces were kept have the outputs
that they had.
"""


@dataclass(frozen=True)
class Trimming:
    """What was trimmed. rows: rows of the word embedding before and after. parameters: those of the whole
    model, before and after. left_out: the source's files that were not taken along."""

    rows: tuple[int, int]
    parameters: tuple[int, int]
    texts: Agreement
    held_out: Agreement | None
    left_out: tuple[str, ...]


def trim_vocabulary(
    model: str | PathLike[str],
    out: str | PathLike[str],
    texts: Iterable[str],
    keep: int | None = None,
    held_out: Iterable[str] | None = None,
) -> Trimming:
    """Write the checkpoint in the folder `model` to `out`, with those pieces of its vocabulary that the texts
    need. Every text whose pieces are kept has the outputs that it had.

    model: a stock or pruned model under any head, or a folder of sentence-transformers around one.
    out: a new folder. texts, held_out: gone through several times; what the second ones would lose is
    counted. keep: only so many of the pieces are kept, those that the texts have most often, beside special
    tokens, prompts of sentence-transformers, single characters and what BPE makes pieces of; by default all
    that the texts have.
    Errors: OSError where there is no checkpoint, or `out` cannot be written; ValueError for a tokenizer or a
    model whose pieces cannot be removed, which says why, and for an entry that is no string.
    """
    source, target = _Untrimmed.open(Path(model)), Path(out)
    if keep is not None:
        checked_int("keep", keep, 0)
    check_new_folder(target)
    check_texts("texts", texts)
    if held_out is not None and not check_texts("held_out", held_out):
        raise ValueError("held_out holds no text")
    always = source.vocabulary.always(source.named)
    always.update(source.vocabulary.count([source.reading.forms("")]))
    forms = (form for text in texts for form in source.reading.forms(text))
    counts = source.vocabulary.count(batches(forms, BATCH))
    if not counts:
        raise ValueError("there is no piece in the texts: nothing says what is to be kept")
    most_frequent = sorted(counts.keys() - always, key=lambda piece: (-counts[piece], piece))[:keep]
    trimmed = source.vocabulary.trim(most_frequent, always, source.padding)
    source.check_positions(trimmed)
    with new_folder(target) as stage:
        parameters = source.write(stage, trimmed)
        before = source.tokenizer, source.vocabulary, source.reading
        compare = Comparison(*before, trimmed, stage / source.inner)
        seen = compare(texts)
        unseen = None if held_out is None else compare(held_out)
    rows = source.rows, len(trimmed.old_ids)
    return Trimming(rows, parameters, seen, unseen, tuple(source.left_out()))


@dataclass(frozen=True)
class _Untrimmed:
    """The checkpoint that is trimmed. root: its folder. inner: where in it config, weights and tokenizer lie.
    reading: what becomes of a text before the tokenizer. named: the ids that the config names, in the fields
    `fields`."""

    root: Path
    inner: str
    reading: Reading
    config: dict[str, Any]
    fields: dict[str, int | list[int]]
    tokenizer: Any
    vocabulary: Vocabulary
    tensors: Tensors
    rows: int

    @classmethod
    def open(cls, root: Path) -> _Untrimmed:
        if not root.is_dir():
            checkpoint_folder(root)  # which says so
        for module in modules_of(str(root)):
            if module.name not in _MODULES:
                raise ValueError(
                    f"{root / MODULES} has a {module.name}, which may know the vocabulary; "
                    f"{', '.join(_MODULES)} do not"
                )
        inner = inner_folder(root)
        folder = checkpoint_folder(root / inner)
        config = read_config(folder)
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in BY_TYPE:
            raise ValueError(f"{folder} is a {shown(kind)} model; {', '.join(BY_TYPE)} are known")
        fields = _token_ids(folder, load_config(folder).to_dict() | config)
        tokenizer = load_tokenizer(str(folder))
        try:
            vocabulary = _vocabulary(folder, tokenizer)
        except ValueError as error:
            raise ValueError(f"the tokenizer of {folder} cannot be trimmed: {error}") from None
        tensors = read_tensors(folder)
        rows = _table_rows(folder, tensors, config, BY_TYPE[kind])
        highest = max(vocabulary.ids.values())
        if highest >= rows:
            raise ValueError(
                f"{folder} cannot be trimmed: its tokenizer has ids up to {highest}, its word embedding has "
                f"{rows} rows"
            )
        return cls(root, inner, Reading.of(root), config, fields, tokenizer, vocabulary, tensors, rows)

    @property
    def family(self) -> Family:
        """The description of the encoder."""
        return BY_TYPE[self.config["model_type"]]

    @property
    def named(self) -> set[int]:
        """The ids of pieces that the config names, and of those that the loader makes special tokens."""
        known = set(self.vocabulary.ids.values())
        special = known & self.tokenizer.added_tokens_decoder.keys()
        named = {piece for ids in self.fields.values() for piece in (ids if isinstance(ids, list) else [ids])}
        without = sorted(piece for piece in named - known if piece >= 0)
        if without:
            raise ValueError(
                f"the config in {self.root / self.inner} names id {without[0]}, which no piece has"
            )
        return named & known | special

    @property
    def padding(self) -> int | None:
        """The padding's id, from which some families count positions."""
        number = self.fields.get("pad_token_id")
        return number if isinstance(number, int) else None

    def check_positions(self, trimmed: Trimmed) -> None:
        """ValueError where the padding's id would change and with it all positions."""
        counts = self.family.positions_from_padding
        if counts and self.padding is not None and trimmed.new_ids[self.padding] != self.padding:
            raise ValueError(
                f"{self.root} counts positions from the id of its padding, {self.padding}, and only "
                f"{len(trimmed.old_ids)} pieces would be left: keep more"
            )

    def write(self, stage: Path, trimmed: Trimmed) -> tuple[int, int]:
        """Write the whole folder; returns the number of parameters before and after."""
        folder = stage / self.inner
        folder.mkdir(parents=True, exist_ok=True)
        for path in self._taken():
            target = stage / path.relative_to(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        write_json(folder / "config.json", self._new_config(trimmed))
        _write_tokenizer(self.root / self.inner, folder, self.vocabulary, trimmed)
        chosen, family = torch.tensor(trimmed.old_ids), self.family
        tensors = {
            name: (tensor[chosen] if _has_pieces(name, family) else tensor).contiguous()
            for name, tensor in self.tensors.items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        card = stage / "README.md"
        if card.is_file():
            with card.open("a", encoding="utf-8") as file:
                file.write(_NOTE.format(len(trimmed.old_ids), self.rows))
        return _numbers(self.tensors), _numbers(tensors)

    def _new_config(self, trimmed: Trimmed) -> dict[str, Any]:
        new_ids = trimmed.new_ids
        changed = {
            name: [new_ids.get(old, old) for old in ids] if isinstance(ids, list) else new_ids.get(ids, ids)
            for name, ids in self.fields.items()
        }
        # Fields that the file leaves to their defaults are written where the default is another piece now.
        changed = {
            name: value
            for name, value in changed.items()
            if name in self.config or value != self.fields[name]
        }
        return {**self.config, **changed, "vocab_size": len(trimmed.old_ids)}

    def _taken(self) -> list[Path]:
        """The source's files that are copied as they are."""
        places = {self.root, self.root / self.inner}
        files = [place / name for place in places for name in _TAKEN if (place / name).is_file()]
        for module in modules_of(str(self.root)):
            if module.path not in ("", self.inner):
                files += [path for path in (self.root / module.path).rglob("*") if path.is_file()]
        return files

    def left_out(self) -> Iterator[str]:
        """The names, from the source's folder, of files that are neither copied nor written anew."""
        anew = {"config.json", "model.safetensors", *VOCABULARY_FILES, "merges.txt"}
        taken = set(self._taken()) | {self.root / self.inner / name for name in anew}
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and path not in taken and not is_hidden(path.relative_to(self.root)):
                yield str(path.relative_to(self.root))


def _token_ids(folder: Path, config: dict[str, Any]) -> dict[str, int | list[int]]:
    """The fields of a config that name ids of pieces. Errors: ValueError for one that holds something else
    than an id, several or none."""
    fields = {}
    for name, value in config.items():
        if not name.endswith("_token_id") or value is None:
            continue
        if any(type(one) is not int for one in (value if isinstance(value, list) else [value])):
            raise ValueError(
                f"the config in {folder} has {name} {shown(value)}; an id or a list of ids is needed"
            )
        fields[name] = value
    return fields


def _vocabulary(folder: Path, tokenizer: Any) -> Vocabulary:
    """The vocabulary in the folder's tokenizer.json; or, where there is none or it lacks tokens that the
    loader adds, that of the tokenizer as it was loaded."""
    loaded, path = Vocabulary.read(tokenizer.backend_tokenizer.to_str()), folder / "tokenizer.json"
    if not path.is_file():
        return loaded
    stored = Vocabulary.read(read_text(path))
    if stored.ids == loaded.ids:
        return stored
    for name in ("truncation", "padding"):  # a loader may set them anew
        loaded.definition[name] = stored.definition[name]
    return loaded


def _table_rows(folder: Path, tensors: Tensors, config: dict[str, Any], family: Family) -> int:
    """The number of rows of the word embedding. Errors: ValueError where there is not exactly one word
    embedding, or where an unknown tensor has as many rows."""
    tables = [name for name in tensors if _is_of(name, [family.embeddings.words])]
    if len(tables) != 1 or tensors[tables[0]].dim() != 2:
        raise ValueError(
            f"{folder} cannot be trimmed: it has {len(tables)} word embeddings, and one is needed"
        )
    rows = len(tensors[tables[0]])
    if config.get("vocab_size", rows) != rows:
        raise ValueError(
            f"{folder} cannot be trimmed: its config has vocab_size {shown(config['vocab_size'])}, its word "
            f"embedding {rows} rows"
        )
    for name, tensor in tensors.items():
        if _has_pieces(name, family) or _never_has_pieces(name, family) or tensor.dim() == 0:
            continue
        if len(tensor) == rows:
            raise ValueError(
                f"{folder} cannot be trimmed: {name} has as many rows as the word embedding, and it is not "
                "known whether they belong to its pieces"
            )
    wrong = [name for name, tensor in tensors.items() if _has_pieces(name, family) and len(tensor) != rows]
    if wrong:
        raise ValueError(
            f"{folder} cannot be trimmed: {wrong[0]} has {len(tensors[wrong[0]])} rows, not {rows}"
        )
    return rows


def _is_of(tensor: str, modules: Iterable[str]) -> bool:
    """Whether a tensor is the weight or the bias of one of these modules, whatever they lie in."""
    owner, _, kind = tensor.rpartition(".")
    return kind in ("weight", "bias") and f".{owner}".endswith(tuple(f".{module}" for module in modules))


def _has_pieces(name: str, family: Family) -> bool:
    """Whether a tensor of this name has a row for each piece."""
    return _is_of(name, (family.embeddings.words, *family.words_rows))


def _never_has_pieces(name: str, family: Family) -> bool:
    """Whether a tensor of this name has no row for a piece, however many rows it has."""
    tables, head = family.embeddings, family.text_head
    others = ("pooler", "classifier", tables.positions, tables.token_types, tables.norm, "position_ids")
    modules = (family.layers, *others, head.first or head.last, family.projection or family.layers)
    return any(f".{module}." in f".{name}." for module in modules)


def _numbers(tensors: Tensors) -> int:
    """How many numbers there are in the weights, int8 ones too; buffers of positions are no weights."""
    return sum(tensor.numel() for tensor in tensors.values() if tensor.dtype != torch.int64)


def _write_tokenizer(source: Path, folder: Path, vocabulary: Vocabulary, trimmed: Trimmed) -> None:
    """Write every file of the tokenizer that names pieces or ids: tokenizer.json always, the others where the
    source has them."""
    model, new_ids = trimmed.definition["model"], trimmed.new_ids
    (folder / "tokenizer.json").write_text(
        json.dumps(trimmed.definition, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    if vocabulary.kind != "Unigram":
        if (source / "vocab.txt").is_file():
            (folder / "vocab.txt").write_text("".join(f"{p}\n" for p in model["vocab"]), encoding="utf-8")
        if (source / "vocab.json").is_file():
            write_json(folder / "vocab.json", model["vocab"])
    if vocabulary.kind == "BPE" and (source / "merges.txt").is_file():
        lines = "".join(f"{left} {right}\n" for left, right in model["merges"])
        (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    renamed = {piece: new_ids[old] for piece, old in vocabulary.ids.items() if old in new_ids}
    added, settings = folder / "added_tokens.json", folder / "tokenizer_config.json"
    if added.is_file():
        write_json(added, {token: renamed[token] for token in read_json(added) if token in renamed})
    if settings.is_file():
        fields = read_json(settings)
        tokens = fields.get("added_tokens_decoder")
        if tokens:
            fields["added_tokens_decoder"] = {
                str(renamed[token["content"]]): token
                for token in tokens.values()
                if token["content"] in renamed
            }
            write_json(settings, fields)
