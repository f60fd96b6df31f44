"""One thread computes the texts of all requests: those that wait together share batches.

A batch is filled up to a number of tokens. A request waits for others only while some are on their way, and
no longer than its deadline. Requests take turns, so that a large one does not hold up the small ones behind
it; and the queue is bounded, so that whoever is taken is answered soon.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition, Thread
from time import monotonic
from typing import Any, Protocol

from pruned_ops.runtime.batch_runner import token_batches
from pruned_ops.serving.limits import Limits
from pruned_ops.serving.refusals import Refusal

# One request gets at most this part of a batch while others wait for theirs.
_TURNS = 4
# How much a batch's rate counts in the mean rate, of which Retry-After is made.
_RECENT = 0.2
_LONGEST_RETRY = 60.0


class Computes(Protocol):
    """What a batcher asks of a model."""

    @property
    def name(self) -> str: ...

    def compute(self, sequences: list[Any]) -> list[Any]: ...


class Watcher(Protocol):
    """Is told what was computed, by the thread that computes."""

    def computed(self, model: str, texts: int, tokens: int, seconds: float) -> None: ...

    def dropped(self, texts: int) -> None: ...


@dataclass(eq=False)
class Job:
    """The texts of one request. since: when it came, or had its last turn. left: places of the texts that
    still wait, the longest last. open: how many have no result yet."""

    model: Computes
    sequences: list[Any]
    done: asyncio.Future[list[Any]]
    since: float
    left: list[int]
    open: int
    tokens: int  # of the texts that still wait
    results: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, model: Computes, sequences: list[Any], loop: asyncio.AbstractEventLoop) -> Job:
        order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))
        tokens = sum(map(len, sequences))
        job = cls(model, sequences, loop.create_future(), monotonic(), order, len(order), tokens)
        job.results = [None] * len(sequences)
        return job

    def take(self, tokens: int) -> list[Part]:
        """The longest texts that wait, of at most so many tokens together; at least one."""
        taken: list[Part] = []
        while self.left and (not taken or len(self.sequences[self.left[-1]]) <= tokens):
            place = self.left.pop()
            taken.append(Part(self, place))
            tokens -= len(taken[-1])
            self.tokens -= len(taken[-1])
        return taken


@dataclass(frozen=True, eq=False)
class Part:
    """One text of a job."""

    job: Job
    place: int

    def __len__(self) -> int:
        return len(self.job.sequences[self.place])


class Arrival:
    """A request whose texts are not there yet. is_late: whether it came when the server had begun to end."""

    def __init__(self, count: Callable[[int], None], is_late: bool) -> None:
        self._count, self.is_late, self._is_over = count, is_late, False

    def is_over(self) -> None:
        """The texts are there, or will not come; saying it twice is once."""
        if not self._is_over:
            self._is_over = True
            self._count(-1)


class Batcher:
    """Computes jobs in a thread of its own. Everything but that thread's work is called by the server's."""

    def __init__(self, limits: Limits, watcher: Watcher) -> None:
        self._limits, self._watcher = limits, watcher
        self._changed = Condition()
        self._queues: dict[Computes, deque[Job]] = {}
        self._tokens = 0  # that wait
        self._coming = 0  # requests that are read or tokenised
        self._under_way: set[Job] = set()
        self._seconds_per_token = 0.0
        self._ends = self._has_given_up = False
        self.is_working = False
        # As a daemon it does not keep the process from ending in the middle of a long batch.
        Thread(target=self._work, name="pruned_ops-models", daemon=True).start()

    @property
    def waiting_tokens(self) -> int:
        """The tokens that wait for their batch."""
        return self._tokens

    @property
    def waiting_requests(self) -> int:
        """The requests that wait, or are computed."""
        return len(self._under_way)

    def arrival(self) -> Arrival:
        """A request that is read and tokenised from now on: batches may wait for it, until their deadline."""
        self._count(1)
        return Arrival(self._count, self._ends)

    def _count(self, change: int) -> None:
        with self._changed:
            self._coming += change
            if not self._coming:
                self._changed.notify_all()

    async def run(self, model: Computes, sequences: list[Any], arrival: Arrival | None = None) -> list[Any]:
        """The results of the sequences. Where the caller is cancelled, what was not begun is dropped.
        arrival, and errors: as `begin`'s; Refusal where the model fails."""
        job = self.begin(model, sequences, arrival)
        try:
            return await job.done
        finally:
            self.forget(job)

    def begin(self, model: Computes, sequences: list[Any], arrival: Arrival | None = None) -> Job:
        """A job of the sequences, whose `done` will have their results; `forget` has to be called after that,
        or earlier. arrival: the request whose texts these are. Errors: Refusal where too much waits, or the
        server ends and this is no request that was under way."""
        is_late = arrival is None or arrival.is_late
        if self._has_given_up or (self._ends and is_late):
            raise Refusal("ending", "the server ends")
        job = Job.of(model, sequences, asyncio.get_running_loop())
        self._add(job)
        if arrival is not None:
            arrival.is_over()
        return job

    def forget(self, job: Job) -> None:
        """Nobody waits for the job any more: what of it was not begun is dropped."""
        self._under_way.discard(job)
        self._drop(job)

    def _add(self, job: Job) -> None:
        with self._changed:
            total = self._tokens + job.tokens
            if self._tokens and total > self._limits.queue_tokens:
                raise Refusal(
                    "overloaded",
                    f"{self._tokens} tokens wait already, and {self._limits.queue_tokens} may: ask again "
                    "later",
                    retry_after=self.retry_after(),
                )
            self._under_way.add(job)
            self._tokens = total
            self._queues.setdefault(job.model, deque()).append(job)
            self._changed.notify_all()

    def retry_after(self) -> float:
        """Seconds in which about half of what waits will be computed."""
        return min(_LONGEST_RETRY, self._tokens * self._seconds_per_token / 2)

    def _drop(self, job: Job) -> None:
        """Let what is left of a job not be computed."""
        if not job.left:
            return
        with self._changed:
            if not job.left:
                return
            self._watcher.dropped(len(job.left))
            self._tokens -= job.tokens
            job.left, job.tokens = [], 0
            self._queues[job.model].remove(job)

    def end(self) -> None:
        """Take no more requests; those that are read or tokenised now may still begin their jobs."""
        self._ends = True

    def give_up(self) -> None:
        """Let everybody who waits be refused, and whoever comes."""
        self._has_given_up = True
        for job in self._under_way:
            if not job.done.done():
                job.done.set_exception(Refusal("ending", "the server ends"))

    # What follows runs in the thread.

    def _work(self) -> None:
        while True:
            parts = self._next()
            model = parts[0].job.model
            self.is_working = True
            for places in token_batches(parts, self._limits.batch_tokens):
                chosen = [parts[place] for place in places]
                try:
                    self._compute(model, chosen)
                except Exception as error:  # a fault of ours, too, is only these requests'
                    _fail(model, chosen, error)
            self.is_working = False

    def _next(self) -> list[Part]:
        """Texts for one model, waiting for them as long as it takes: those whose request has waited longest,
        and what of others fits with them."""
        with self._changed:
            self._changed.wait_for(lambda: self._tokens)
            while True:
                model = min(
                    (model for model, queue in self._queues.items() if queue),
                    key=lambda model: self._queues[model][0].since,
                )
                seconds = self._queues[model][0].since + self._limits.wait_ms / 1000 - monotonic()
                if seconds <= 0 or not self._coming or self._tokens >= self._limits.batch_tokens:
                    return self._taken(self._queues[model])
                self._changed.wait(seconds)
                self._changed.wait_for(lambda: self._tokens)  # meanwhile all may have gone

    def _taken(self, queue: deque[Job]) -> list[Part]:
        """Up to a batch's tokens from the queue, a share from each job in turn."""
        parts: list[Part] = []
        room = self._limits.batch_tokens
        while queue and room > 0:
            job = queue.popleft()
            taken = job.take(min(room, self._limits.batch_tokens // _TURNS))
            size = sum(map(len, taken))
            room -= size
            self._tokens -= size
            parts += taken
            if job.left:
                job.since = monotonic()  # or what other models' requests wait for would come after all of it
                queue.append(job)
        return parts

    def _compute(self, model: Computes, parts: list[Part]) -> None:
        parts = [part for part in parts if not part.job.done.done()]
        if not parts:
            return
        start = monotonic()
        try:
            results = model.compute([part.job.sequences[part.place] for part in parts])
        except Exception as error:  # a model may raise any
            self._compute_apart(model, parts, error)
            return
        seconds, tokens = monotonic() - start, sum(map(len, parts))
        self._watcher.computed(model.name, len(parts), tokens, seconds)
        mean = self._seconds_per_token or seconds / tokens
        self._seconds_per_token = mean + _RECENT * (seconds / tokens - mean)
        ended: list[tuple[Job, Refusal | None]] = []
        for part, result in zip(parts, results, strict=True):
            job = part.job
            job.results[part.place] = result
            job.open -= 1
            if result is None:
                ended.append((job, _not_finite(model, part)))
            elif not job.open:
                ended.append((job, None))
        _settle(ended)

    def _compute_apart(self, model: Computes, parts: list[Part], error: Exception) -> None:
        """After an error of a whole batch: each job's texts alone, so that the others are answered."""
        jobs = dict.fromkeys(part.job for part in parts)
        if len(jobs) > 1:
            for job in jobs:
                self._compute(model, [part for part in parts if part.job is job])
            return
        _fail(model, parts, error)


def _fail(model: Computes, parts: list[Part], error: Exception) -> None:
    """Refuse the requests of these texts, in one line."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    refusal = Refusal("fault", f"{model.name} failed: {reason}")
    _settle([(job, refusal) for job in dict.fromkeys(part.job for part in parts)])


def _not_finite(model: Computes, part: Part) -> Refusal:
    return Refusal("fault", f"{model.name} computed numbers that are not finite for input {part.place}")


def _settle(ended: list[tuple[Job, Refusal | None]]) -> None:
    """Hand jobs that ended to their callers, with their results or what went wrong; all at once, because each
    call into a loop wakes it."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Refusal | None]]] = {}
    for job, refusal in ended:
        by_loop.setdefault(job.done.get_loop(), []).append((job, refusal))
    for loop, jobs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_hand_over, jobs)
        except RuntimeError:
            pass  # the loop was closed meanwhile


def _hand_over(ended: list[tuple[Job, Refusal | None]]) -> None:
    for job, refusal in ended:
        if job.done.done():
            continue
        if refusal is None:
            job.done.set_result(job.results)
        else:
            job.done.set_exception(refusal)
