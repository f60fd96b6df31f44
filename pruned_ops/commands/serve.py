"""`pruned-ops serve`: models behind the HTTP APIs that clients of embedders and rerankers speak."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruned_ops.command_line import add_dtype, check_counts, dtype_of, model_place
from pruned_ops.files import TextFile
from pruned_ops.serving.limits import Limits

if TYPE_CHECKING:
    from pruned_ops.serving.models import Loading, Served

MISSING = 'the server needs FastAPI, uvicorn, orjson and prometheus-client: pip install "pruned_ops[serve]"'
# The fields of Limits that options set, with what each is in the help.
_COUNTS = {
    "body_bytes": "bytes of a request at most",
    "texts": "texts of a request at most",
    "requests": "requests under way at most; more are refused with 429",
    "queue_tokens": "tokens that wait at most; a request that adds more is refused with 429",
    "batch_tokens": "tokens of a batch at most, padding included",
}
_SECONDS = {
    "wait_ms": "milliseconds that a request waits at most for others that are on their way",
    "patience": "seconds in which a client has to have sent a whole request, or taken an answer",
    "grace": "seconds that requests under way have to be answered at SIGTERM or Ctrl-C",
}


def add_command(commands: Any) -> None:
    """Add the command and its options to the parser's commands."""
    parser = commands.add_parser(
        "serve",
        help="serve models over HTTP, to existing clients",
        description="Serve embedders, rerankers, classifiers and question answering. Clients of "
        "text-embeddings-inference, of OpenAI's embeddings and of Cohere's and Jina's reranking need another "
        "address and nothing else; a browser gets a page to ask questions.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "models",
        nargs="+",
        type=_named_place,
        metavar="MODEL",
        help="folder or hub name of a model; NAME=MODEL calls it NAME",
    )
    _add_access(parser)
    _add_loading(parser)
    _add_limits(parser)


def _named_place(text: str) -> str:
    """MODEL or NAME=MODEL, out of an argument; ~ is the home folder where MODEL begins with it."""
    name, separator, place = model_place(text).partition("=")
    return name + separator + model_place(place)


def _add_access(parser: argparse.ArgumentParser) -> None:
    """Add the options that say who may ask."""
    access = parser.add_argument_group("who may ask")
    access.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)"
    )
    access.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port to listen at; 0: a free one"
    )
    access.add_argument(
        "--allow-host",
        nargs="+",
        default=(),
        metavar="NAME",
        help="answer under these names too (default: only as --host and localhost)",
    )
    access.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys, one a line; requests have to bring one"
    )
    access.add_argument(
        "--allow-origin",
        nargs="+",
        default=(),
        metavar="URL",
        help="pages of these sites may ask from a browser (default: none)",
    )


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how models run."""
    loading = parser.add_argument_group("how models run")
    loading.add_argument("--device", help="where they run (default: a GPU where there is one)")
    add_dtype(loading, "dtype of the linear layers on a CPU, of all of a model on a GPU", float16=True)
    loading.add_argument(
        "--texts-file",
        type=Path,
        metavar="FILE",
        help="with --dtype int8: texts, one a line, by which the linear layers that stay fp32 are found",
    )
    loading.add_argument("--threads", type=int, metavar="N", help="threads of a model (default: all cores)")
    loading.add_argument(
        "--plain", action="store_true", help="run the models as transformers does, to compare with"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Limits`, with its defaults."""
    group, defaults = parser.add_argument_group("limits"), Limits()
    for name, text in (_COUNTS | _SECONDS).items():
        default = getattr(defaults, name)
        option, kind = f"--{name.replace('_', '-')}", type(default)
        group.add_argument(option, type=kind, default=default, metavar="N", help=text)
    group.add_argument(
        "--auto-truncate",
        action="store_true",
        help="cut texts that are too long for the model, where the API would refuse them",
    )


def run(arguments: argparse.Namespace) -> None:
    """Load the models and serve them until SIGTERM or Ctrl-C."""
    try:
        from pruned_ops.serving.application import Access, application
        from pruned_ops.serving.connections import Hosts, bound, serve, url
        from pruned_ops.serving.guard import Keys
        from pruned_ops.serving.models import load_all
        from pruned_ops.serving.service import Service
    except ModuleNotFoundError as error:
        raise ImportError(f"{MISSING} ({error})") from error
    limits, loading = _limits(arguments), _loading(arguments)
    keys = None if arguments.api_key_file is None else Keys(arguments.api_key_file)
    access = Access(Hosts(arguments.host, tuple(arguments.allow_host)), keys, tuple(arguments.allow_origin))
    with bound(arguments.host, arguments.port) as place:
        models = load_all(arguments.models, loading)
        for served in models.values():
            print(described(served), flush=True)
        service = Service(models, limits)
        place.listen()  # whoever reads the next line may ask
        print(f"{url(place)}  (Ctrl-C ends it)", flush=True)
        serve(application(service, access), place, service, limits)


def _limits(arguments: argparse.Namespace) -> Limits:
    """The limits that the options set. Errors: ValueError for numbers that cannot be."""
    check_counts(arguments, *_COUNTS)
    limits = {name: getattr(arguments, name) for name in (*_COUNTS, *_SECONDS)}
    return Limits(**limits, auto_truncate=arguments.auto_truncate)


def _loading(arguments: argparse.Namespace) -> Loading:
    """How the options want models to be loaded. Errors: OSError or ValueError for files that cannot be read,
    and options that do not go together."""
    from pruned_ops.serving.models import Loading

    check_counts(arguments, "threads")
    if arguments.threads is not None:
        import torch

        torch.set_num_threads(arguments.threads)
    texts: tuple[str, ...] = ()
    if arguments.texts_file is not None:
        texts = tuple(TextFile(arguments.texts_file))
        if not texts:
            raise ValueError(f"{arguments.texts_file} holds no text")
    return Loading(arguments.device, dtype_of(arguments), texts, arguments.plain)


def described(served: Served) -> str:
    """A line that says what a model does."""
    facts: list[str] = [served.kind]
    if served.dimension:
        facts.append(f"{served.dimension} dimensions")
    if served.labels:
        facts.append(f"labels {', '.join(served.labels[:8])}{' ...' if len(served.labels) > 8 else ''}")
    facts.append(f"at most {served.encoder.max_tokens} tokens")
    if served.dtype != "float32":
        facts.append(f"linear layers in {served.dtype}")
    return f"{served.name}: {', '.join(facts)}{''.join(f' ({note})' for note in served.notes)}"
