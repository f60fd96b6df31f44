"""A teacher's start and end logits of every training window, and its answer types' where it has them, kept on
disk.

A window's values are written the first time it is seen; every later epoch and phase, and every later run with
the same teacher and windows, reads them instead of asking the teacher. The folder holds

    cache.json      fingerprint, number of windows, tokens: what the values belong to
    checksums.u32   (windows,) CRC-32 of each window's values, 0 where there are none yet
    logits.f32      little-endian fp32: start logits of window 0, its end logits, its types', window 1, ...

The files have their full size from the beginning. fp32 because that is exact.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

METADATA, CHECKSUMS, LOGITS = "cache.json", "checksums.u32", "logits.f32"
_FORMAT = 1
_EXACT_IN_FP32 = (torch.float32, torch.bfloat16, torch.float16)
# What a config says of where a model lies and who saved it, not of what it computes.
_OF_NO_MATTER = ("_name_or_path", "transformers_version")


class TeacherCache:
    """Logits of training windows 0, 1, ..., in a folder.

    The processes of a run, on one machine, may share the folder, its creation included. What is there is
    never replaced: the first values stored for a window stay.

    What is guaranteed: `logits` returns what `store` was given, bit for bit, or None. Values are stored
    before their checksum, into a mapping that belongs to the kernel, so a process killed at any moment
    (SIGKILL) keeps every window it had stored, and leaves at most the one in progress unmarked. A power cut
    may lose any of the latest pages, in any order; two processes may write a window's (differently rounded)
    values at once. Either leaves a checksum that is not that of the values: such a window counts as absent.
    """

    def __init__(self, folder: Path, lengths: Sequence[int], fingerprint: str, types: int = 0) -> None:
        """Open the folder's cache, or make one where the folder is empty or absent.

        lengths: (windows,) tokens of each window. fingerprint: of teacher and windows, see `fingerprint`.
        types: how many answer types the teacher has a logit for, in each window.
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
        wanted = {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "windows": len(self._lengths),
            "tokens": int(self._lengths.sum()),
            "types": types,
            "lengths_sha256": hashlib.sha256(self._lengths.astype("<i8").tobytes()).hexdigest(),
        }
        if not (folder / METADATA).exists():
            self._create(wanted)
        self._check(wanted)
        self._checksums = _mapped(folder / CHECKSUMS, "<u4")
        self._logits = _mapped(folder / LOGITS, "<f4")
        self._forget_torn_windows()

    def __len__(self) -> int:
        """Number of windows, stored or not."""
        return len(self._lengths)

    @property
    def filled(self) -> int:
        """Number of windows whose logits are there, by whichever process."""
        return int(np.count_nonzero(self._checksums))

    def logits(self, numbers: Tensor, seqlen: int) -> tuple[Tensor, ...] | None:
        """Start and end logits of the windows `numbers` (batch,): (batch, seqlen) each, fp32, on the CPU;
        then those of the answer types, (batch, types), where there are any.

        Right-padded with zeros, which callers mask. None where any of the windows is not there yet.
        Raises ValueError for a number that is no window's, or a window longer than seqlen.
        """
        rows = self._rows(numbers, seqlen)
        found = [self._values(row) for row in rows]
        padded = np.zeros((2, len(rows), seqlen), dtype=np.float32)
        kinds = np.zeros((len(rows), self._types), dtype=np.float32)
        for place, values in enumerate(found):
            if values is None:
                return None
            tokens = int(self._lengths[rows[place]])
            padded[:, place, :tokens] = values[: 2 * tokens].reshape(2, tokens)
            kinds[place] = values[2 * tokens :]
        start, end = torch.from_numpy(padded)
        return (start, end, torch.from_numpy(kinds)) if self._types else (start, end)

    def store(
        self, numbers: Tensor, start: Tensor, end: Tensor, mask: Tensor, types: Tensor | None = None
    ) -> None:
        """Keep the logits of the windows `numbers` (batch,), where they are not kept yet.

        start, end: (batch, seqlen) fp32, or 16 bits, which fp32 holds exactly. mask: (batch, seqlen), nonzero
        at a window's tokens, which stand at the beginning of its row. types: (batch, types), where the cache
        has them. Raises ValueError for anything else.
        """
        rows = self._rows(numbers, mask.size(-1))
        kinds = torch.zeros(len(rows), 0) if types is None else types
        shapes = {name: (len(rows), mask.size(-1)) for name in ("start", "end", "mask")}
        shapes["types"] = (len(rows), self._types)
        for name, tensor in (("start", start), ("end", end), ("mask", mask), ("types", kinds)):
            if tensor.shape != shapes[name]:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, for {len(rows)} windows")
            if name != "mask" and tensor.dtype not in _EXACT_IN_FP32:
                raise ValueError(f"{name} is {tensor.dtype}, which fp32 does not hold exactly")
        expected = np.arange(mask.size(-1)) < self._lengths[rows, None]
        if not np.array_equal(mask.cpu().numpy() != 0, expected):
            raise ValueError("the mask is not that of right-padded windows of the lengths given to the cache")
        parts = [tensor.detach().float().cpu().numpy() for tensor in (start, end, kinds)]
        for row, *one in zip(rows, *parts, strict=True):
            if self._values(row) is None:
                # The order matters: see the class. Zeroed first, for a window whose old checksum is wrong.
                self._checksums[row] = 0
                tokens = self._lengths[row]
                values = np.concatenate([one[0][:tokens], one[1][:tokens], one[2]], dtype="<f4")
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
        """(2 * tokens + types,): a copy, so that what was checked is what is returned; None where it is not
        there."""
        checksum = int(self._checksums[row])
        if checksum == 0:
            return None
        values = self._logits[self._place(row)].copy()
        return values if _checksum(values) == checksum else None

    def _forget_torn_windows(self) -> None:
        # So that `filled` counts whole windows only. Another process's window, if caught in between, is lost
        # by this, and its logits asked for once more.
        for row in np.flatnonzero(self._checksums).tolist():
            if self._values(row) is None:
                self._checksums[row] = 0

    def _create(self, metadata: Mapping[str, Any]) -> None:
        """Put the files there, of which the metadata, the last, says that the others are whole.

        Several processes may do this at once: a link, unlike a rename, never replaces what is there, so all
        go on with the file of the first.
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
                    # Zeros are written, not left as a hole in the file: a disk without room is an error
                    # here, and not a SIGBUS in the middle of the training.
                    np.zeros(self._sizes[name], dtype=np.uint8).tofile(part)
                os.link(part, self.folder / name)
            except FileExistsError:
                pass
            finally:
                part.unlink(missing_ok=True)

    def _check(self, wanted: Mapping[str, Any]) -> None:
        remedy = "remove it, or choose another --cache-teacher folder"
        try:
            there = json.loads((self.folder / METADATA).read_text("utf-8"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise ValueError(f"{self.folder}: {METADATA} cannot be read ({error}): {remedy}") from None
        there = there if isinstance(there, dict) else {}
        for key, value in wanted.items():
            if there.get(key) != value:
                raise ValueError(
                    f"{self.folder} is a cache of another teacher, tokenisation or data: its {key} is "
                    f"{there.get(key)}, this run's is {value}; {remedy}"
                )
        for name, size in self._sizes.items():
            path = self.folder / name
            found = path.stat().st_size if path.exists() else 0
            if found != size:
                raise ValueError(f"{path} has {found} bytes, not {size}: the cache is broken; {remedy}")


def fingerprint(model: nn.Module, features: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256, in hex, of a teacher and the windows it is asked about.

    model: its config (if it has one) and state dict count, not where it lies or which version saved it.
    features: those of `training_features`; input_ids and token_type_ids count, in this order of windows.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if config is not None else {}
    known = {key: value for key, value in fields.items() if key not in _OF_NO_MATTER}
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for feature in features:
        for name in ("input_ids", "token_type_ids"):
            ids = np.asarray(feature.get(name, ()), dtype="<i8")
            digest.update(f"{name} {len(ids)}".encode())
            digest.update(ids.tobytes())
    return digest.hexdigest()


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r+") if path.stat().st_size else np.zeros(0, dtype)


def _checksum(values: NDArray[np.float32]) -> int:
    """CRC-32, and 1 for 0, which means that there is nothing."""
    return zlib.crc32(values.tobytes()) or 1
