"""Compensation: the output matrices and biases of a narrow model, solved anew so that what is left makes up
for what was removed. It needs inputs without labels, and no training.

bias: the mean of what a layer's removed heads or FFN units gave goes into the output bias. least-squares: the
output matrix is solved by ridge regression of what was lost on the units that are left, and the bias, where
there is one, goes with it (Kwon et al. 2022, Kurtic et al. 2023). auto: for each part, whichever of these
lowers the loss on other inputs; often the least squares do, but they can also hurt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruned_ops.checkpoints.loading import load_tokenizer
from pruned_ops.models.families.known import family_of
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.models.stock import config_of, find_encoder, layers_of, model_shape
from pruned_ops.qa.logits import evaluating
from pruned_ops.runtime.texts import tokenized_batches
from pruned_trainer.pruning.decision import Decision
from pruned_trainer.pruning.importance import Batches
from pruned_trainer.pruning.options import COMPENSATIONS, COMPENSATIONS_MADE
from pruned_trainer.tasks.output_kinds import Outputs, comparable_outputs, divergences, label_losses
from pruned_trainer.tasks.task import accepted, is_labelled, without_labels

# The output projection of each part in a layer, among `LayerParts`.
PROJECTIONS = {"heads": "attention_output", "ffn": "down"}
# The parts in the order in which `auto` chooses for them: FFN units are most of what is removed.
PARTS = ("ffn", "heads")
# The ridge, as a part of the mean variance of the units that are left.
RIDGE = 1e-3
# Of the calibration's batches, `auto` keeps each so-manieth for choosing where it is given no others.
HELD_EVERY = 4
# Texts are cut to at most so many tokens, and run in batches of so many.
TEXT_TOKENS, TEXT_BATCH = 384, 8

Place = tuple[str, int]  # a part and the number of a layer


@dataclass(frozen=True)
class Compensation:
    """What was done to a narrow model: the method for each part, and the loss without and with it (None where
    no loss was needed)."""

    methods: dict[str, str]
    loss_before: float | None = None
    loss_after: float | None = None

    def __str__(self) -> str:
        ways = ", ".join(f"{method} on {part}" for part, method in self.methods.items() if method != "none")
        losses = (
            "" if self.loss_before is None else f"; loss {self.loss_before:z.4f} to {self.loss_after:z.4f}"
        )
        return (ways or "none") + losses


def refuse_compensation(model: nn.Module, method: str) -> None:
    """ValueError where a method corrects biases alone, and a part's projections have none."""
    kind = family_of(find_encoder(model).config).kind(find_encoder(model).config)
    lacking = [part for part, has in (("heads", kind.attention_bias), ("ffn", kind.ffn_bias)) if not has]
    if method == "bias" and lacking:
        raise ValueError(
            f"the output projections of {' and '.join(lacking)} have no bias in this "
            f"{type(model).__name__}: compensate by least-squares, auto or none (--compensate)"
        )


@dataclass
class _ErrorMoments:
    """Sums over tokens, in fp64: of the inputs that are left (tokens, kept), of the error that their
    projection makes (tokens, hidden), and of their products."""

    tokens: int = 0
    sums: list[Tensor] = field(default_factory=list)

    def add(self, kept: Tensor, error: Tensor) -> None:
        batch_sums = [kept.sum(0), error.sum(0), kept.T @ kept, error.T @ kept]
        self.sums = [a + b for a, b in zip(self.sums, batch_sums, strict=True)] if self.sums else batch_sums
        self.tokens += len(kept)

    def corrections(self, method: str, ridge: float, has_bias: bool) -> tuple[Tensor | None, Tensor]:
        """What is to be added to the output matrix (None: nothing) and to the output bias, which is 0 where
        there is none: the matrix then makes up for the means, too."""
        kept_sum, error_sum, squares, products = self.sums
        mean, error = kept_sum / self.tokens * has_bias, error_sum / self.tokens * has_bias
        if method == "bias" or not len(mean):
            return None, error
        covariance = squares / self.tokens - torch.outer(mean, mean)
        joint = products / self.tokens - torch.outer(error, mean)
        # The floor is far above the rounding of inputs that never change, whose variance is 0.
        floor = 1e-12 * squares.diagonal().mean() / self.tokens + torch.finfo(torch.float64).tiny
        penalty = ridge * covariance.diagonal().mean() + floor
        matrix = torch.linalg.solve(covariance + penalty * torch.eye(len(mean)).to(mean), joint.T).T
        return matrix, error - matrix @ mean


class _Compensator:
    """A narrow model whose projections can be set to any choice of methods, one for each part."""

    def __init__(
        self, narrow: PreTrainedModel, model: PreTrainedModel, decision: Decision, batches: Batches,
        ridge: float,
    ) -> None:  # fmt: skip
        self.narrow, self.model, self.batches, self.ridge = narrow, model, batches, ridge
        self.layers = layers_of(find_encoder(narrow))
        self.sources = layers_of(find_encoder(model))
        device = next(model.parameters()).device
        head_dim = model_shape(model).head_dim
        self.hidden = slice(None) if decision.hidden is None else list(decision.hidden.indices)
        self.kept: dict[Place, Tensor] = {}
        for i, layer in enumerate(decision.layers):
            heads = torch.tensor(layer.heads.indices, dtype=torch.long, device=device)
            columns = heads[:, None] * head_dim + torch.arange(head_dim, device=device)
            self.kept["heads", i] = columns.flatten()
            self.kept["ffn", i] = torch.tensor(layer.ffn.indices, dtype=torch.long, device=device)
        self.before = {
            place: {name: x.detach().clone() for name, x in self.projection(place).named_parameters()}
            for place in self.kept
        }

    def projection(self, place: Place) -> Any:
        return getattr(self.layers[place[1]], PROJECTIONS[place[0]])

    def places(self) -> Iterator[Place]:
        """Every place in the order in which a model computes them."""
        return ((part, i) for i, part in product(range(len(self.layers)), ("heads", "ffn")))

    def methods_for(self, part: str) -> tuple[str, ...]:
        """The methods that can correct a part: least squares alone where it has no biases."""
        biased = "bias" in self.before[part, 0]
        return tuple(method for method in COMPENSATIONS_MADE if biased or method != "bias")

    def reset(self) -> None:
        """Set every projection to what compaction made of it."""
        for place, parameters in self.before.items():
            for name, before in parameters.items():
                getattr(self.projection(place), name).data.copy_(before)

    def correct(self, place: Place, moments: _ErrorMoments, method: str) -> None:
        """Add a method's corrections to one projection, in its own dtype."""
        if not moments.tokens:
            return
        projection, before = self.projection(place), self.before[place]
        matrix, offset = moments.corrections(method, self.ridge, "bias" in before)
        if "bias" in before:
            projection.bias.data.copy_(before["bias"].double() + offset)
        if matrix is not None:
            projection.weight.data.copy_(before["weight"].double() + matrix)

    def whole_moments(self) -> dict[Place, _ErrorMoments]:
        """The moments of every place, from one pass of the source model."""
        moments = {place: _ErrorMoments() for place in self.places()}

        def hooks(place: Place, real: Tensor) -> Iterator[Any]:
            part, i = place
            source, raw = getattr(self.sources[i], PROJECTIONS[part]), []
            kept, weight = self.kept[place], self.before[place]["weight"]
            rows = source.weight.detach().double()[self.hidden]

            def before_gates(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                raw.append(inputs[0][real].double()[:, kept])

            def after_gates(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                kept_inputs = raw.pop()
                whole = inputs[0][real].double() @ rows.T
                moments[place].add(kept_inputs, whole - kept_inputs @ weight.double().T)

            yield source.register_forward_pre_hook(before_gates, prepend=True)
            yield source.register_forward_pre_hook(after_gates)

        for batch in self.batches:
            real = batch["attention_mask"].bool()
            with _hooked(hook for place in moments for hook in hooks(place, real)):
                self.model(**without_labels(batch))
        return moments

    def moments_in_turn(self, place: Place) -> _ErrorMoments:
        """The moments of one place in the narrow model as it is now: its own inputs, and what the sum with
        its output lacks of the source model's, whatever the reason."""
        moments, sums, kept_inputs = _ErrorMoments(), list[Tensor](), list[Tensor]()

        def keep(into: list[Tensor], real: Tensor, columns: Any) -> Callable[..., None]:
            return lambda _, inputs: into.append(inputs[0][real].double()[:, columns])

        for batch in self.batches:
            real = batch["attention_mask"].bool()
            norm, own_norm = (_norm_after(model, place) for model in (self.model, self.narrow))
            with _hooked([norm.register_forward_pre_hook(keep(sums, real, self.hidden))]):
                self.model(**without_labels(batch))
            narrow_hooks = [
                own_norm.register_forward_pre_hook(keep(sums, real, slice(None))),
                self.projection(place).register_forward_pre_hook(keep(kept_inputs, real, slice(None))),
            ]
            with _hooked(narrow_hooks):
                self.narrow(**without_labels(batch))
            whole, lacking = sums
            moments.add(kept_inputs.pop(), whole - lacking)
            sums.clear()
        return moments


def _norm_after(model: PreTrainedModel, place: Place) -> Any:
    """The LayerNorm that takes the sum of a projection's output and of what went around it."""
    (part, i), encoder = place, find_encoder(model)
    family, layers = family_of(encoder.config), layers_of(encoder)
    if not family.kind(encoder.config).norm_first:
        return layers[i].attention_norm if part == "heads" else layers[i].ffn_norm
    if part == "heads":
        return layers[i].ffn_norm
    if i + 1 < len(layers):
        return layers[i + 1].attention_norm
    assert family.final_norm is not None, "a stack that norms first norms once more at its end"
    return encoder.get_submodule(family.final_norm)


def compensate(
    narrow: PreTrainedModel,
    model: PreTrainedModel,
    decision: Decision,
    calibration: Batches,
    method: str = "auto",
    validation: Batches | None = None,
    reference: PreTrainedModel | None = None,
    layer_by_layer: bool = False,
    ridge: float = RIDGE,
    pooling: str = "mean",
) -> Compensation:
    """Compensate `narrow`, in place, for what `decision` removed from `model`.

    model: the source of the compaction, which is left as it is; gates that are attached to it act as in
    evaluation. calibration: padded batches, some hundred windows in all. method: one of COMPENSATIONS.
    validation: the batches on which auto compares losses (default: every HELD_EVERYth of the calibration's,
    which then serves for nothing else). The loss is the batches' own where they have the task's LABELS, else
    the divergence from `reference` (default: the model). layer_by_layer: each layer is solved on the outputs
    of the compensated layers before it, which takes two passes over the calibration for every part of every
    layer instead of one for all. pooling: as for `comparable_outputs`. Errors: ValueError for an unknown
    method, too few batches, and for bias where a projection has none (auto leaves that out there).
    """
    _check(method, calibration, validation)
    refuse_compensation(model, method)
    if method == "none":
        return Compensation(dict.fromkeys(PARTS, "none"))
    if method == "auto" and validation is None:
        validation = calibration[::HELD_EVERY]
        calibration = [batch for i, batch in enumerate(calibration) if i % HELD_EVERY]
    with _evaluating(narrow, model, reference):
        compensator = _Compensator(narrow, model, decision, calibration, ridge)
        moments = None if layer_by_layer else compensator.whole_moments()

        def build(methods: dict[str, str]) -> None:
            compensator.reset()
            for place in compensator.places():
                if methods[place[0]] != "none":
                    place_moments = compensator.moments_in_turn(place) if moments is None else moments[place]
                    compensator.correct(place, place_moments, methods[place[0]])

        if method != "auto":
            methods = dict.fromkeys(PARTS, method)
            build(methods)
            return Compensation(methods)
        assert validation is not None
        loss = _loss_on(narrow, reference or model, validation, pooling)
        return _best(build, loss, compensator.methods_for)


def _check(method: str, calibration: Batches, validation: Batches | None) -> None:
    if method not in COMPENSATIONS:
        raise ValueError(f"compensation is {method!r}; one of {', '.join(COMPENSATIONS)} is needed")
    needed = 2 if method == "auto" and validation is None else 1
    if method != "none" and len(calibration) < needed:
        raise ValueError(f"{len(calibration)} calibration batches: {method} needs {needed} or more")
    for batch in (*calibration, *(validation or ())):
        if "attention_mask" not in batch:
            raise ValueError(
                f"a batch to compensate on has no attention_mask (it has {', '.join(batch)}): without it "
                "padding cannot be told from text"
            )


def _best(
    build: Callable[[dict[str, str]], None],
    loss: Callable[[], float],
    methods_for: Callable[[str], Sequence[str]],
) -> Compensation:
    """Build, for one part after another, what lowers the loss most; nothing where nothing does."""
    methods = dict.fromkeys(PARTS, "none")
    build(methods)
    before = least = loss()
    for part in PARTS:
        for candidate in methods_for(part):
            build({**methods, part: candidate})
            reached = loss()
            if reached < least:
                least, methods = reached, {**methods, part: candidate}
    build(methods)
    return Compensation(methods, before, least)


def _loss_on(
    narrow: PreTrainedModel, reference: PreTrainedModel, batches: Batches, pooling: str
) -> Callable[[], float]:
    """A function of no arguments, the mean loss of `narrow` as it is when that is called."""
    labelled = all(is_labelled(batch) for batch in batches)
    expected = [] if labelled else [_outputs(reference, batch, pooling) for batch in batches]

    def loss() -> float:
        outputs = [_outputs(narrow, batch, pooling) for batch in batches]
        if labelled:
            config = config_of(narrow)
            losses = [
                label_losses(output, batch, config) for output, batch in zip(outputs, batches, strict=True)
            ]
        else:
            losses = [
                divergences(output, target, batch["attention_mask"])
                for output, target, batch in zip(outputs, expected, batches, strict=True)
            ]
        return float(torch.cat(losses).double().mean())

    return loss


def _outputs(model: PreTrainedModel, batch: dict[str, Tensor], pooling: str) -> Outputs:
    outputs, mask = model(**without_labels(batch)), batch["attention_mask"]
    return comparable_outputs(outputs, config_of(model), mask, pooling)


def calibration_batches(model: PreTrainedModel, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Texts as padded batches for `model`, by the tokenizer of the checkpoint that it, or the encoder in it,
    was loaded from.

    Errors: OSError or ValueError where that has no tokenizer.
    """
    if not texts:
        return []
    encoder = find_encoder(model)
    tokenizer = load_tokenizer(str(getattr(model, "name_or_path", "") or encoder.name_or_path))
    longest = min(TEXT_TOKENS, longest_sequence(encoder.config))
    batches = tokenized_batches(tokenizer, sorted(texts, key=len), longest, TEXT_BATCH)
    return [
        accepted(model, {name: tensor.to(encoder.device) for name, tensor in batch.items()})
        for batch in batches
    ]


@contextmanager
def _hooked(hooks: Any) -> Iterator[None]:
    """Remove these hooks after the block."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        yield


@contextmanager
def _evaluating(*models: PreTrainedModel | None) -> Iterator[None]:
    """Put the models into evaluation mode, without any gradient, inside the block."""
    with ExitStack() as stack, torch.no_grad():
        for model in filter(None, models):
            stack.enter_context(evaluating(model))
        yield
