"""`tune` times the GPU kernels' configurations on an optimised model's shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from pruned_ops.ops.registry import BACKENDS, BackendError
from pruned_ops.runtime.cuda_graphs import CAPTURE
from pruned_ops.runtime.packed_encoder import PackedEncoder, packed_encoders


def tune(model: nn.Module, batches: Iterable[Sequence[int]]) -> int:
    """Time the GPU kernels' configurations on this optimised model's shapes and these batches.

    The fastest configurations are kept, on disk too, and later runs with batches of about these sizes use
    them. Without it a model of the kernels' time chooses. Graphs that were recorded before are dropped where
    a shape was timed.
    batches: the lengths, in tokens, of the sequences of each batch. They are timed in the sizes in which they
    run: as graphs, which round them up. Returns how many shapes were timed; known shapes are not timed again.
    Errors: ValueError where `model` is not optimised or not on a GPU, or a batch is empty; BackendError where
    no backend can be tuned.
    """
    batches = [tuple(lengths) for lengths in batches]
    if any(not lengths or min(lengths) < 1 for lengths in batches):
        raise ValueError("a batch of no sequences, or with one of no tokens, cannot be tuned for")
    encoders = packed_encoders(model)
    if not encoders:
        raise ValueError("tune takes an optimised model: call pruned_ops.optimize(model) first")
    if any(encoder.device.type != "cuda" for encoder in encoders):
        raise ValueError("tune times GPU kernels, and this model is on the CPU: call model.to('cuda') first")
    tuners = {backend: backend.tune for backend in BACKENDS.values() if backend.tune is not None}
    available = [tune_backend for backend, tune_backend in tuners.items() if backend.missing is None]
    if not available:
        reasons = "; ".join(f"{backend.name}: {backend.missing}" for backend in tuners)
        raise BackendError(f"no backend can be tuned here: {reasons}")
    with CAPTURE:  # what is timed is captured, and nothing else may be meanwhile
        timed = sum(
            tune_backend(
                packed.encoder.running_shape,
                _as_run(packed, batches),
                packed.dtype,
                packed.device,
                gated=packed.encoder.kind.gated,
                norm_first=packed.encoder.kind.norm_first,
            )
            for tune_backend in available
            for packed in encoders
        )
    for packed in encoders if timed else ():
        if packed.engine is not None:
            packed.engine.invalidate()
    return timed


def _as_run(packed: PackedEncoder, batches: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """Batches of the sizes in which these run: as graphs, if there are any."""
    if packed.engine is None:
        return batches
    return [size for lengths in batches for size in packed.engine.lengths_of_graphs(lengths)]
