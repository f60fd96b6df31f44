"""A choice that is held to measured time: narrow models are timed beside the dense one until one meets the
target."""

from __future__ import annotations

from transformers import PreTrainedModel

from pruned_ops import ModelShape
from pruned_ops.measure.timing import Workload, interleave, threads
from pruned_ops.models.inputs import padding_id
from pruned_ops.models.stock import running_encoder
from pruned_ops.runtime.optimize import optimized
from pruned_trainer.distributed import say
from pruned_trainer.jobs.job import Job, paused, timed_part
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.decision import Decision, decide
from pruned_trainer.pruning.gates import Scores
from pruned_trainer.pruning.options import Target

# A choice meets a target in time when the time that it takes lies between these parts of the time allowed:
# within 3% of it, a little below, because the next measurement of the same models may differ by a percent.
MEETS = (0.97, 1.0)
AIM = 0.99
# The number of choices that are made and timed before the best so far is taken, and the rounds of each
# timing.
ATTEMPTS, ROUNDS = 8, 5
# A choice is timed on fewer batches where all of them would take longer than so.
MOST_SECONDS = 60.0


def decide_in_time(job: Job, student: PreTrainedModel, scores: Scores, target: Target) -> Decision:
    """The best-ranking choice whose measured time meets the target.

    It decides by the table, times the narrow model against the dense one, corrects the fraction of the dense
    time that it asks the table for, and decides again. Errors: ValueError, with the fastest time that was
    measured, where none of ATTEMPTS choices meets the target.
    """
    allowed = job.budget.allowed_fraction(target)
    fraction = allowed * AIM
    best: Decision | None = None
    timed: dict[ModelShape, float] = {}
    # The largest fraction asked of the table that met the target, and the smallest that did not.
    low, high = 0.0, 1.0
    for _ in range(ATTEMPTS):
        try:
            decision = decide(scores, job.budget, target, job.align, fraction)
        except ValueError:  # no choice is that small
            low, fraction = max(low, fraction), (max(low, fraction) + high) / 2
            continue
        shape = decision.shape(job.budget.dense)
        if shape in timed:
            break
        table = job.budget.fraction(shape)
        measured = timed[shape] = measured_fraction(job, compact(student, decision), target)
        say(
            f"a choice that the table puts at {table:.3f} of the dense time takes {measured:.3f} of it "
            f"({allowed:.3f} asked)"
        )
        if allowed * MEETS[0] <= measured <= allowed * MEETS[1]:
            return decision
        if measured < allowed:
            low, best, base = fraction, decision, fraction
        else:
            high = base = table  # anything above it, and up to what was asked, would give the same choice
        corrected = base * allowed * AIM / measured
        fraction = corrected if low < corrected < high else (low + high) / 2
    if best is None:
        fastest = f"the fastest took {min(timed.values()):.3f}" if timed else "the smallest is larger"
        raise ValueError(f"no choice took at most {allowed:.3f} of the dense time; {fastest}")
    return best


def measured_fraction(job: Job, narrow: PreTrainedModel, target: Target) -> float:
    """The narrow model's time on the workload over the dense model's (or over the table's time of the dense
    model, for a target in milliseconds), both as the pruned model will be served, measured interleaved until
    the ratio is settled."""
    workload = choice_workload(job, target)
    config, settings = running_encoder(job.dense).config, job.settings
    dense_part, narrow_part = timed_part(job.dense), timed_part(narrow.eval())
    inputs = workload.inputs(config.vocab_size, padding_id(config), job.device)
    dtype = settings.served_dtype
    with (
        threads(settings.threads),
        paused(job.dense, dtype),  # which may be the teacher of the gates' training, in a dtype of its own
        optimized(dense_part, dtype) as dense,
        optimized(narrow_part, dtype) as fast,
    ):
        runners = {"dense": lambda batch: dense(**batch), "narrow": lambda batch: fast(**batch)}
        timings = interleave(runners, workload, inputs, ROUNDS, settle=("narrow", "dense"))
    if target.unit == "latency_ms":  # of the whole workload's mean batch
        scale = job.workload.mean_tokens / workload.mean_tokens
        return timings["narrow"].ms(50) * scale / job.budget.total
    return 1 / timings["narrow"].speedup_over(timings["dense"])


def choice_workload(job: Job, target: Target) -> Workload:
    """The batches that choices for a target in time are timed on: those of the job's workload, or as many of
    them, evenly spread, as ROUNDS take at most MOST_SECONDS for by the table."""
    affordable = MOST_SECONDS / (ROUNDS + 1) / round_seconds(job, target)
    return job.workload.spread(max(1, int(min(len(job.workload.batches), affordable))))


def round_seconds(job: Job, target: Target) -> float:
    """Seconds that both models take for a batch, by the table, where the narrow one meets the target."""
    return job.budget.total * (1 + job.budget.allowed_fraction(target)) / 1000
