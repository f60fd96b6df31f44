"""`pruned-ops ask DIR --serve`: a page to ask a text questions, on this machine; two models side by side."""

# No postponed annotations here: FastAPI reads them, and some name what only a function knows.
import time
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pruned_ops.qa.answerer import QuestionAnswerer

# Characters that one request may have: a question, and a text of some 250 pages.
LONGEST_QUESTION, LONGEST_TEXT = 1_000, 500_000
# Bytes of a request's body: what these take at most, as JSON escapes.
LONGEST_BODY = 12 * (LONGEST_QUESTION + LONGEST_TEXT) + 1_000
MISSING = 'the page needs FastAPI: pip install "pruned_ops[serve]"'


def application(answerers: "Mapping[str, QuestionAnswerer]") -> "FastAPI":
    """The page at /, and /answer: {question, text} -> an answer of each model, with its milliseconds.

    answerers: name -> model. Questions are answered one after another. Errors: ImportError that says what to
    install.
    """
    try:
        from fastapi import FastAPI, HTTPException, Request
        from fastapi.responses import HTMLResponse
        from pydantic import BaseModel, Field
    except ImportError as error:
        raise ImportError(MISSING) from error
    from threading import Lock

    class Asked(BaseModel):
        question: str = Field(min_length=1, max_length=LONGEST_QUESTION)
        text: str = Field(max_length=LONGEST_TEXT)

    app = FastAPI(title="pruned-ops ask", docs_url=None, redoc_url=None, openapi_url=None)
    one_at_a_time = Lock()
    page = files("pruned_ops.commands").joinpath("serve.html").read_text(encoding="utf-8")

    @app.middleware("http")
    async def bounded(request: Request, call_next: Any) -> Any:
        from starlette.responses import JSONResponse

        length = request.headers.get("content-length")
        if request.method == "POST" and (
            length is None or not length.isdigit() or int(length) > LONGEST_BODY
        ):
            return JSONResponse({"detail": f"a request of at most {LONGEST_BODY} bytes is taken"}, 413)
        response = await call_next(request)
        # Only what came with the page runs in it, and no other site may show it.
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
            "frame-ancestors 'none'"
        )
        return response

    @app.get("/", response_class=HTMLResponse)
    def index() -> str:
        return page

    @app.post("/answer")
    def answer(asked: Asked) -> dict[str, Any]:
        found = []
        with one_at_a_time:
            for name, answerer in answerers.items():
                try:
                    found.append({"model": name, **answered(answerer, asked.question, asked.text)})
                except ValueError as error:
                    raise HTTPException(422, str(error)) from error
        return {"answers": found}

    return app


def answered(answerer: "QuestionAnswerer", question: str, text: str) -> dict[str, Any]:
    """The answer, and the best span where that is "": places in UTF-16 units, as a browser counts."""
    start = time.perf_counter()
    best = answerer.answer(question, text, top_k=2)
    seconds = time.perf_counter() - start
    first = best[0]
    span = next((one for one in best if one.answer), None)

    def units(place: int) -> int:
        return len(text[:place].encode("utf-16-le")) // 2

    return {
        "answer": first.answer,
        "score": first.score,
        "best_span": None
        if span is None
        else {"text": span.answer, "score": span.score, "start": units(span.start), "end": units(span.end)},
        "ms": 1000 * seconds,
    }


def serve(answerers: "Mapping[str, QuestionAnswerer]", host: str, port: int) -> None:
    """Until Ctrl-C. Errors: ImportError that says what to install."""
    app = application(answerers)
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError(MISSING) from error
    print(f"http://{host}:{port}  (Ctrl-C ends it)", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")
