"""`pruned-ops ask DIR --serve`: a page to ask a text questions, on this machine; two models side by side."""

# Annotations are not postponed here: FastAPI reads them, and some name what only a function knows.
import asyncio
import time
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pruned_ops.commands.http_server import Busy, Hosts, Worker
from pruned_ops.commands.http_server import serve as serve_application
from pruned_ops.files import parse_json

if TYPE_CHECKING:
    from fastapi import FastAPI

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
# What is left of a refused request is not read.
_CLOSE = {"Connection": "close"}


def application(
    answerers: "Mapping[str, QuestionAnswerer]", hosts: Hosts | None = None, worker: Worker | None = None
) -> "FastAPI":
    """The page at /, and /answer: {question, text} -> an answer of each model, with its milliseconds.

    answerers: name -> model. Questions are answered one after another, by `worker`; meanwhile the page and
    /health answer. hosts: the names under which it answers, by default this machine's own. Errors:
    ImportError that says what to install.
    """
    try:
        from fastapi import FastAPI, HTTPException, Request
        from fastapi.responses import HTMLResponse, JSONResponse
        from pydantic import BaseModel, Field, ValidationError
        from starlette.requests import ClientDisconnect
    except ImportError as error:
        raise ImportError(MISSING) from error

    class Asked(BaseModel):
        question: str = Field(min_length=1, max_length=LONGEST_QUESTION)
        text: str = Field(max_length=LONGEST_TEXT)

    app = FastAPI(title="pruned-ops ask", docs_url=None, redoc_url=None, openapi_url=None)
    known, model = hosts or Hosts("localhost"), worker or Worker()
    page = files("pruned_ops.commands").joinpath("serve.html").read_text(encoding="utf-8")

    @app.middleware("http")
    async def guarded(request: Request, call_next: Any) -> Any:
        host = request.headers.get("host")
        if not known.include(host):
            detail = f"this page is not {host!r}; --allow-host names hosts that it is besides localhost"
            return JSONResponse({"detail": detail}, 421, _CLOSE)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    async def asked_in(request: Request) -> Asked:
        """What the request asks; HTTPException where it is too large or no question."""
        body = await _limited_body(request)
        if body is None:
            raise HTTPException(413, f"a request of at most {LONGEST_BODY} bytes is taken", _CLOSE)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # Any other site can make a browser send other types.
            raise HTTPException(415, "the question has to come as application/json")
        try:
            # In a thread, because some megabytes take a while.
            return Asked.model_validate(await asyncio.to_thread(parse_json, body))
        except ValidationError as error:
            # Without the input, which may be long.
            problems = error.errors(include_url=False, include_context=False, include_input=False)
            raise HTTPException(422, problems) from None
        except ValueError as error:
            raise HTTPException(422, f"no JSON object with a question and a text: {error}") from None

    @app.get("/", response_class=HTMLResponse)
    async def index() -> str:
        return page

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "models": list(answerers)}

    @app.post("/answer")
    async def answer(request: Request) -> dict[str, Any]:
        try:
            asked = await asked_in(request)
            answers = await model.run(lambda: _answers(answerers, asked.question, asked.text))
        except ClientDisconnect:
            raise HTTPException(400, "the client is gone") from None  # which nobody reads
        except Busy as error:
            raise HTTPException(503, str(error)) from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        return {"answers": answers}

    return app


async def _limited_body(request: Any) -> bytes | None:
    """The body of a request; None where it is too large, whatever the request says of its length."""
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > LONGEST_BODY:
        return None
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            return None
    return bytes(body)


def _answers(answerers: "Mapping[str, QuestionAnswerer]", question: str, text: str) -> list[dict[str, Any]]:
    return [{"model": name, **answered(answerer, question, text)} for name, answerer in answerers.items()]


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


def serve(
    answerers: "Mapping[str, QuestionAnswerer]", host: str, port: int, allowed: tuple[str, ...] = ()
) -> None:
    """Serve the page until Ctrl-C. allowed: further names of the host. Errors: ImportError that says what to
    install."""
    worker = Worker()
    app = application(answerers, Hosts(host, allowed), worker)
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(MISSING) from error
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{port}  (Ctrl-C ends it)", flush=True)
    serve_application(app, host, port, worker)
