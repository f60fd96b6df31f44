"""Questions and texts of any length -> answers: the server's own route, and the pipelines' form of it."""

from __future__ import annotations

import time

from fastapi import Request, Response
from pydantic import Field

from pruned_ops.qa.answerer import QuestionAnswerer
from pruned_ops.qa.decoding import Answer, Candidates
from pruned_ops.qa.windows import RefusedQuestion, Window, cut_each
from pruned_ops.serving.forms import Form
from pruned_ops.serving.models import Served
from pruned_ops.serving.refusals import Refusal
from pruned_ops.serving.service import Service, as_json

# The most characters of a question, and of a text: one of some 250 pages.
LONGEST_QUESTION, LONGEST_CONTEXT = 1_000, 500_000
MOST_ANSWERS = 100


class AnswerRequest(Form):
    question: str = Field(min_length=1, max_length=LONGEST_QUESTION)
    context: str = Field(max_length=LONGEST_CONTEXT)
    model: str | None = None
    top_k: int = Field(default=1, ge=1, le=MOST_ANSWERS)
    allow_none: bool = True


class PipelineParameters(Form):
    """max_answer_len: tokens of the longest answer."""

    top_k: int | None = Field(default=None, ge=1, le=MOST_ANSWERS)
    handle_impossible_answer: bool | None = None
    max_answer_len: int | None = Field(default=None, ge=1)


class PipelineRequest(Form):
    """What InferenceClient.question_answering sends."""

    inputs: AnswerRequest
    model: str | None = None
    parameters: PipelineParameters | None = None


async def answer(service: Service, request: Request) -> Response:
    """POST /v1/qa: {question, context} -> the answer, "" for none; the best span even then; the milliseconds
    from the request on. Places are counted in Unicode's characters, as Python counts."""
    start = time.perf_counter()
    form = await service.read(request, AnswerRequest)
    served = service.pick(form.model, "question answering")
    ranked = await _answers(service, request, served, form, max(2, form.top_k), None)
    span = next((answer for answer in ranked if answer.answer), None)
    return as_json(
        {
            "model": served.name,
            **vars(ranked[0]),
            "best_span": None if span is None else vars(span),
            "answers": [vars(answer) for answer in ranked[: form.top_k]],
            "ms": 1000 * (time.perf_counter() - start),
        }
    )


async def pipeline(service: Service, request: Request) -> Response:
    """POST / for question answering, in the pipelines' form: one answer, or top_k of them."""
    form = await service.read(request, PipelineRequest)
    served = service.pick(form.inputs.model if form.model is None else form.model, "question answering")
    parameters = form.parameters or PipelineParameters()
    top_k = parameters.top_k or 1
    asked = form.inputs.model_copy(update={"allow_none": bool(parameters.handle_impossible_answer)})
    ranked = await _answers(service, request, served, asked, top_k, parameters.max_answer_len)
    answers = [vars(answer) for answer in ranked[:top_k]]
    return as_json(answers[0] if top_k == 1 else answers)


async def _answers(
    service: Service,
    request: Request,
    served: Served,
    form: AnswerRequest,
    top_k: int,
    max_answer_tokens: int | None,
) -> list[Answer]:
    """What `QuestionAnswerer.answer` gives, with windows that share batches with other requests'.
    max_answer_tokens: by default the answerer's."""
    answerer = served.answerer
    assert answerer is not None
    size = len(form.question) + len(form.context)
    windows = await service.beside(
        size, lambda: _windows(answerer, form.question, form.context), may_wait=answerer.lock.is_held
    )
    logits = await service.computed(request, served, windows)

    def ranked() -> list[Answer]:
        reading = answerer.reading
        longest = max_answer_tokens or reading.max_answer_tokens
        best = Candidates(form.context, max(reading.n_best, top_k), longest)
        for window, pair in zip(windows, logits, strict=True):
            best.add(window, pair, "a window")
        decoded = best.decoded()
        assert decoded is not None  # a question has a window, whatever its text
        threshold = answerer.null_score_threshold
        return decoded.ranked(threshold, answerer.calibration, form.allow_none)

    return await service.beside(size, ranked)


def _windows(answerer: QuestionAnswerer, question: str, context: str) -> list[Window]:
    """The question's windows. Errors: Refusal for a question that leaves no room for its text."""
    sizes = (answerer.reading.max_length, answerer.reading.stride)
    with answerer.lock:
        try:
            (windows,) = cut_each(answerer.tokenizer, [question], [context], *sizes, indices=[0])
            return list(windows)
        except RefusedQuestion as refused:
            raise Refusal("invalid", f"the question {refused.reason}", "question") from None
