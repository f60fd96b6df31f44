"""A cache on disk of a teacher's start and end logits for every training window, and its answer type logits
where it has them.

A window's values are written the first time it is seen; every later epoch and phase, and every later run with
the same teacher and windows, reads them instead of asking the teacher. The folder holds

    cache.json      fingerprint, dtype, number of windows, tokens: what the values belong to
    checksums.u32   (windows,) CRC-32 of each window's values, 0 where a window has none yet
    logits.f32      little-endian fp32: start logits of window 0, its end logits, its types', window 1, ...

The files have their full size from the beginning. Values are fp32, which holds every teacher's logits
exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pruned_ops.files import read_json, shown

METADATA, CHECKSUMS, LOGITS = "cache.json", "checksums.u32", "logits.f32"
_FORMAT = 1
_EXACT_IN_FP32 = (torch.float32, torch.bfloat16, torch.float16)
# The fields of a config that say where a model lies and who saved it, and not what it computes.
_NOT_COMPUTED = ("_name_or_path", "transformers_version")


class TeacherCache:
    """The logits of training windows 0, 1, ..., in a folder.

    The processes of a run, on one machine, may share the folder, and may create it together. Stored values
    are never replaced: the first ones of a window stay.

    The cache guarantees this: `logits` returns what `store` was given, bit for bit, or None. Values are
    stored before their checksum, into a mapping that belongs to the kernel, so a process killed at any moment
    (SIGKILL) keeps every window it had stored, and leaves at most the one in progress unmarked. A power cut
    may lose any of the latest pages, in any order; two processes may write a window's (differently rounded)
    values at once. Either leaves a checksum that is not that of the values: such a window counts as absent.
    """

    def __init__(
        self,
        folder: Path,
        lengths: Sequence[int],
        fingerprint: str,
        types: int = 0,
        dtype: str = "float32",
    ) -> None:
        """Open the folder's cache, or make one where the folder is empty or absent.

        lengths: (windows,) tokens of each window. fingerprint: of teacher and windows, see `fingerprint`.
        types: the number of answer types that the teacher has a logit for, in each window. dtype: in which
        the teacher runs.
        Raises ValueError, saying what differs, where the folder holds something else; OSError where the disk
        has no room.
        """
        self.folder = folder
        self._lengths = np.asarray(lengths, dtype=np.int64).reshape(-1)
        if (self._lengths < 0).any():
            raise ValueError(f"a window has {self._lengths.min()} tokens")
        self._widths = 2 * self._lengths + types
        self._ends = np.cumsum(self._widths)
        self._types = types
        self._sizes = {CHECKSUMS: 4 * len(self._lengths), LOGITS: 4 * int(self._widths.sum())}
        metadata = {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "windows": len(self._lengths),
            "tokens": int(self._lengths.sum()),
            "types": types,
            "dtype": dtype,
            "lengths_sha256": hashlib.sha256(self._lengths.astype("<i8").tobytes()).hexdigest(),
        }
        if not (folder / METADATA).exists():
            self._create(metadata)
        self._check(metadata)
        self._checksums = _mapped(folder / CHECKSUMS, "<u4")
        self._logits = _mapped(folder / LOGITS, "<f4")
        self._forget_torn_windows()

    def __len__(self) -> int:
        """The number of windows, stored or not."""
        return len(self._lengths)

    @property
    def filled(self) -> int:
        """The number of windows whose logits are stored, by whichever process."""
        return int(np.count_nonzero(self._checksums))

    def logits(self, numbers: Tensor, seqlen: int) -> tuple[Tensor, ...] | None:
        """Start and end logits of the windows `numbers` (batch,): (batch, seqlen) each, fp32, on the CPU;
        then those of the answer types, (batch, types), where the cache has them.

        They are right-padded with zeros, which callers mask. None where any of the windows is not stored yet.
        Raises ValueError for a number that is no window's, or a window longer than seqlen.
        """
        rows = self._rows(numbers, seqlen)
        stored = [self._values(row) for row in rows]
        padded = np.zeros((2, len(rows), seqlen), dtype=np.float32)
        answer_types = np.zeros((len(rows), self._types), dtype=np.float32)
        for place, values in enumerate(stored):
            if values is None:
                return None
            tokens = int(self._lengths[rows[place]])
            padded[:, place, :tokens] = values[: 2 * tokens].reshape(2, tokens)
            answer_types[place] = values[2 * tokens :]
        start, end = torch.from_numpy(padded)
        return (start, end, torch.from_numpy(answer_types)) if self._types else (start, end)

    def store(
        self, numbers: Tensor, start: Tensor, end: Tensor, mask: Tensor, types: Tensor | None = None
    ) -> None:
        """Store the logits of the windows `numbers` (batch,), where they are not stored yet.

        start, end: (batch, seqlen) fp32, or 16 bits, which fp32 holds exactly. mask: (batch, seqlen), nonzero
        at a window's tokens, which stand at the beginning of its row. types: (batch, types), where the cache
        has them. Raises ValueError for anything else.
        """
        rows = self._rows(numbers, mask.size(-1))
        types = torch.zeros(len(rows), 0) if types is None else types
        shapes = {name: (len(rows), mask.size(-1)) for name in ("start", "end", "mask")}
        shapes["types"] = (len(rows), self._types)
        for name, tensor in (("start", start), ("end", end), ("mask", mask), ("types", types)):
            if tensor.shape != shapes[name]:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, for {len(rows)} windows")
            if name != "mask" and tensor.dtype not in _EXACT_IN_FP32:
                raise ValueError(f"{name} is {tensor.dtype}, which fp32 does not hold exactly")
        expected = np.arange(mask.size(-1)) < self._lengths[rows, None]
        if not np.array_equal(mask.cpu().numpy() != 0, expected):
            raise ValueError("the mask is not that of right-padded windows of the lengths given to the cache")
        arrays = [tensor.detach().float().cpu().numpy() for tensor in (start, end, types)]
        for row, starts, ends, kinds in zip(rows, *arrays, strict=True):
            if self._values(row) is None:
                # The order matters, as the class explains. The checksum of a window may be there and wrong.
                self._checksums[row] = 0
                tokens = self._lengths[row]
                values = np.concatenate([starts[:tokens], ends[:tokens], kinds], dtype="<f4")
                self._logits[self._place(row)] = values
                self._checksums[row] = _checksum(values)

    def _rows(self, numbers: Tensor, seqlen: int) -> list[int]:
        rows = [int(number) for number in numbers.reshape(-1).tolist()]
        for row in rows:
            if not 0 <= row < len(self):
                raise ValueError(f"there is no window {row}: the cache is for {len(self)}")
            if self._lengths[row] > seqlen:
                raise ValueError(f"window {row} has {self._lengths[row]} tokens, the batch only {seqlen}")
        return rows

    def _place(self, row: int) -> slice:
        end = int(self._ends[row])
        return slice(end - int(self._widths[row]), end)

    def _values(self, row: int) -> NDArray[np.float32] | None:
        """A window's values, (2 * tokens + types,), as a copy, so that no other process changes them after
        the check; None where they are not stored."""
        checksum = int(self._checksums[row])
        if checksum == 0:
            return None
        values = self._logits[self._place(row)].copy()
        return values if _checksum(values) == checksum else None

    def _forget_torn_windows(self) -> None:
        # `filled` then counts whole windows only. A window that another process is storing just now may be
        # forgotten, too; the teacher is then asked for it once more.
        for row in np.flatnonzero(self._checksums).tolist():
            if self._values(row) is None:
                self._checksums[row] = 0

    def _create(self, metadata: Mapping[str, Any]) -> None:
        """Create the files. The metadata comes last and shows that the others are whole.

        Several processes may do this at once: a link, unlike a rename, never replaces a file, so all go on
        with the file of the first.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        ours = (METADATA, CHECKSUMS, LOGITS)
        others = [p.name for p in self.folder.iterdir() if not p.name.startswith(ours)]
        if others:
            raise ValueError(f"{self.folder} is no teacher cache and not empty (it holds {others[0]})")
        for name in (CHECKSUMS, LOGITS, METADATA):
            part = self.folder / f"{name}.{uuid.uuid4().hex}"
            try:
                if name == METADATA:
                    part.write_text(json.dumps(metadata, indent=1) + "\n", "utf-8")
                else:
                    # The zeros are written, and not left as a hole in the file, so that a disk without room
                    # is an error here, and not a SIGBUS in the middle of the training.
                    np.zeros(self._sizes[name], dtype=np.uint8).tofile(part)
                os.link(part, self.folder / name)
            except FileExistsError:
                pass
            finally:
                part.unlink(missing_ok=True)

    def _check(self, metadata: Mapping[str, Any]) -> None:
        """ValueError where the files are not those of this metadata, or not whole."""
        remedy = "remove it, or choose another --cache-teacher folder"
        try:
            stored = read_json(self.folder / METADATA, "description of a cache")
        except ValueError as error:
            raise ValueError(f"{error}: {remedy}") from None
        stored = stored if isinstance(stored, dict) else {}
        for key, value in metadata.items():
            if stored.get(key) != value:
                raise ValueError(
                    f"{self.folder} is a cache of another teacher, precision, tokenisation or data: its "
                    f"{key} is {shown(stored.get(key))}, this run's is {shown(value)}; {remedy}"
                )
        for name, size in self._sizes.items():
            path = self.folder / name
            present = path.stat().st_size if path.exists() else 0
            if present != size:
                raise ValueError(f"{path} has {present} bytes, not {size}: the cache is broken; {remedy}")


def fingerprint(model: nn.Module, features: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256, in hex, of a teacher and of the windows whose logits are stored.

    model: its config (if it has one) and state dict count; its folder and the version that saved it do not.
    features: as from `training_features`; input_ids and token_type_ids count, in this order of windows.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if config is not None else {}
    known = {key: value for key, value in fields.items() if key not in _NOT_COMPUTED}
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    for content in weights_content(model):
        digest.update(content)
    for feature in features:
        for name in ("input_ids", "token_type_ids"):
            ids = np.asarray(feature.get(name, ()), dtype="<i8")
            digest.update(f"{name} {len(ids)}".encode())
            digest.update(ids.tobytes())
    return digest.hexdigest()


def weights_content(model: nn.Module) -> Iterator[bytes | memoryview]:
    """The names, dtypes, shapes and bytes of the tensors in a model's state dict, in the order of the names,
    for a digest. What a module keeps there beside tensors (its extra state) does not count."""
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r+") if path.stat().st_size else np.zeros(0, dtype)


def _checksum(values: NDArray[np.float32]) -> int:
    """CRC-32, but 1 in place of 0, which marks a window without values."""
    return zlib.crc32(values.tobytes()) or 1
