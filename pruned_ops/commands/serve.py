"""`pruned-ops ask DIR --serve`: a page to ask a text questions, on this machine; two models side by side."""

# Annotations are not postponed here: FastAPI reads them, and some name what only a function knows.
import time
from collections.abc import Mapping
from importlib.resources import files
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

    from pruned_ops.qa.answerer import QuestionAnswerer

# The most characters that one request may have: a question, and a text of some 250 pages.
LONGEST_QUESTION, LONGEST_TEXT = 1_000, 500_000
# The most bytes of a request's body: those of the longest question and text, written as JSON escapes.
LONGEST_BODY = 12 * (LONGEST_QUESTION + LONGEST_TEXT) + 1_000
MISSING = 'the page needs FastAPI: pip install "pruned_ops[serve]"'
# Only the page's own styles and scripts run in it, and no other site may show it.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'"
)


def application(answerers: "Mapping[str, QuestionAnswerer]") -> "FastAPI":
    """The page at /, and /answer: {question, text} -> an answer of each model, with its milliseconds.

    answerers: name -> model. Questions are answered one after another. Errors: ImportError that says what to
    install.
    """
    try:
        from fastapi import FastAPI, HTTPException
        from fastapi.responses import HTMLResponse
        from pydantic import BaseModel, Field
    except ImportError as error:
        raise ImportError(MISSING) from error

    class Asked(BaseModel):
        question: str = Field(min_length=1, max_length=LONGEST_QUESTION)
        text: str = Field(max_length=LONGEST_TEXT)

    app = FastAPI(title="pruned-ops ask", docs_url=None, redoc_url=None, openapi_url=None)
    app.middleware("http")(_guarded)
    one_at_a_time = Lock()
    page = files("pruned_ops.commands").joinpath("serve.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    def index() -> str:
        return page

    @app.post("/answer")
    def answer(asked: Asked) -> dict[str, Any]:
        try:
            with one_at_a_time:
                answers = [
                    {"model": name, **answered(answerer, asked.question, asked.text)}
                    for name, answerer in answerers.items()
                ]
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        return {"answers": answers}

    return app


async def _guarded(request: "Request", call_next: Any) -> Any:
    """Refuse a request that is too large before it is read; send the page's policy with every response."""
    from starlette.responses import JSONResponse

    length = request.headers.get("content-length")
    if request.method == "POST" and (length is None or not length.isdigit() or int(length) > LONGEST_BODY):
        return JSONResponse({"detail": f"a request of at most {LONGEST_BODY} bytes is taken"}, 413)
    response = await call_next(request)
    response.headers["Content-Security-Policy"] = POLICY
    return response


def answered(answerer: "QuestionAnswerer", question: str, text: str) -> dict[str, Any]:
    """The answer, and the best span even where the answer is "". Places are counted in UTF-16 units, as a
    browser counts them."""
    start = time.perf_counter()
    best = answerer.answer(question, text, top_k=2)
    seconds = time.perf_counter() - start
    span = next((answer for answer in best if answer.answer), None)

    def units(place: int) -> int:
        return len(text[:place].encode("utf-16-le")) // 2

    return {
        "answer": best[0].answer,
        "score": best[0].score,
        "best_span": None
        if span is None
        else {"text": span.answer, "score": span.score, "start": units(span.start), "end": units(span.end)},
        "ms": 1000 * seconds,
    }


def serve(answerers: "Mapping[str, QuestionAnswerer]", host: str, port: int) -> None:
    """Serve the page until Ctrl-C. Errors: ImportError that says what to install."""
    app = application(answerers)
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError(MISSING) from error
    print(f"http://{host}:{port}  (Ctrl-C ends it)", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")
