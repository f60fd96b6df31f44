"""What a CUDA graph records works on the GPU alone: models on the meta device, which holds no values, show
every tensor of the host that is read, and every look at a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from family_models import ANSWERS, PRUNED_TYPES, TEXTS, TOKENS, pruned, stock
from head_models import natural_questions
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.layers.weights import AlignedWeights
from pruned_ops.models.inputs import packed_inputs
from pruned_ops.models.stock import find_encoder
from pruned_ops.runtime.known_heads import hook_head
from pruned_ops.runtime.packed_encoder import PackedEncoder

# Its attention is computed on a CPU alone.
NOT_ON_A_GPU = ("DebertaV2", "pruned_deberta_v2")
MEAN = {"classifier_pooling": "mean"}


def made() -> list[Any]:
    """One stock and one pruned model of every family under every head that a graph holds."""
    cases: dict[str, Callable[[], Any]] = {"natural questions": natural_questions}
    for pruned_type, stem in PRUNED_TYPES.items():
        if pruned_type in NOT_ON_A_GPU:
            continue
        for head in (ANSWERS, TEXTS, TOKENS):
            cases[f"{stem} {head}"] = lambda stem=stem, head=head: stock(stem, head)  # type: ignore[misc]
            cases[f"{pruned_type} {head}"] = lambda kind=pruned_type, head=head: pruned(kind, head)  # type: ignore[misc]
    cases["pruned mean"] = lambda: pruned("pruned_modernbert", TEXTS, **MEAN)
    return [pytest.param(make, id=name) for name, make in cases.items()]


class OnItsDevice(TorchDispatchMode):
    """Lets no op read or make a tensor elsewhere than on the meta device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, output)):
            if isinstance(leaf, Tensor):
                assert leaf.device.type == "meta", f"{function} has a tensor on {leaf.device}"
        return output


@pytest.mark.parametrize("make", made())
def test_a_batch_is_computed_on_its_device_alone(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the mask, whose lengths the host knows, to the head's logits, padded anywhere and not at all; all
    in the model's dtype."""
    monkeypatch.setattr(AlignedWeights, "refuse", staticmethod(lambda parts: None))
    with torch.no_grad():
        model = make().half().to("meta")
        encoder, (head, _) = PackedEncoder(find_encoder(model)), hook_head(model)
        for lengths in ((20, 3, 11, 7), (9, 9)):
            mask = torch.ones(len(lengths), max(lengths), dtype=torch.int64, device="meta")
            ids = torch.ones_like(mask)
            with OnItsDevice():
                batch = PackedBatch.from_mask(mask, *mask.shape, mask.device, lengths)
                _, inputs = packed_inputs(encoder.config, encoder.device, ids, mask, batch=batch)
                outputs = [
                    one
                    for each in (None, *([] if head is None else [head]))
                    for one in encoder.compute(inputs, batch.cu_seqlens, batch.max_seqlen, each)
                    if one is not None
                ]
            assert len(outputs) >= (1 if head is None else 2)
            assert all(one.dtype == torch.float16 for one in outputs)


def test_a_tensor_of_the_host_and_a_look_at_a_value_are_found() -> None:
    """The test above has teeth."""
    rows = torch.zeros(3, 2, device="meta")
    for fault in (
        lambda: rows[torch.tensor([0, 1])],
        lambda: torch.ones(3).to("meta") @ rows,
        lambda: rows[rows > 0],
        lambda: rows.sum().item(),
        lambda: int(rows.argmax()),
    ):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), OnItsDevice():
            fault()
