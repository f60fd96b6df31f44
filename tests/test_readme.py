"""What README.md and docs/ show is there and runs: Python, commands and options, links, paths and names."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

import pruned_ops
import pruned_trainer
from inputs import stock_model
from matching import save_checkpoint
from pruned_ops import Answer
from pruned_ops.cli import main as pruned_ops_main
from pruned_ops.models.families.known import FAMILIES
from pruned_ops.models.natural_questions import with_answer_types
from pruned_ops.runtime.refusals import refuse_encoder
from pruned_ops.serving.limits import Limits
from pruned_trainer import Distillation
from pruned_trainer.cli import main as pruned_trainer_main
from pruned_trainer.jobs.settings import BATCH_SIZE, PAPER_BATCH_SIZE, PruneSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
# Where the examples of docs/serve.md look for a server.
ADDRESS = "http://127.0.0.1:8000"
README_LINES = 160
COMMANDS = {"pruned-ops": pruned_ops_main, "pruned-trainer": pruned_trainer_main}
# What the examples load -> the head of the small model that takes its place here.
MODELS = {
    "deepset/roberta-base-squad2": "answers",
    "build/demo": "answers",
    "build/nq": "answer types",
    "cardiffnlp/twitter-roberta-base-sentiment-latest": "labels",
    "cross-encoder/ms-marco-MiniLM-L6-v2": "score",
    "sentence-transformers/all-MiniLM-L6-v2": "none",
}
# Options of programs that are not ours.
OTHERS = {"--durations", "--no-build-isolation", "--no-deps", "--index-url", "--nproc-per-node", "--strict"}
FOLDERS = ("pruned_ops/", "python/", "tests/", "benchmarks/", "csrc/", "docs/")


def blocks(kind: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block of this language."""
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
    return [
        (page, body) for page, text in PAGES.items() for name, body in fenced.findall(text) if name == kind
    ]


def inline_code() -> list[tuple[str, str]]:
    """(page, text) of all that stands between single backticks, on one line each."""
    fenced = re.compile(r"^```.*?^```$", re.S | re.M)
    return [
        (page, " ".join(code.split()))
        for page, text in PAGES.items()
        for code in re.findall(r"`([^`]+)`", fenced.sub("", text))
    ]


def command_lines() -> list[str]:
    """The lines of all plain blocks, continued lines joined, comments left out; and all code in sentences."""
    joined = "\n".join(body for _, body in blocks("")).replace("\\\n", " ")
    lines = [line.split(" #")[0].strip() for line in joined.splitlines()]
    return sorted({line for line in (*lines, *(code for _, code in inline_code())) if line})


def our_command_lines() -> list[str]:
    lines = [
        re.sub(r"^torchrun .*-m pruned_trainer\.cli", "pruned-trainer", line) for line in command_lines()
    ]
    return sorted({line for line in lines if line.split(" ")[0] in COMMANDS and " " in line})


@cache
def help_of(program: str, command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as ended:
        COMMANDS[program]([command, "--help"] if command else ["--help"])
    assert ended.value.code == 0, f"{program} {command} --help"
    return printed.getvalue()


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint with a tokenizer for each head that the examples need."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=100
    )
    made = {
        "answers": stock_model(),
        "answer types": with_answer_types(stock_model()),
        "labels": BertForSequenceClassification(config),
        "score": BertForSequenceClassification(BertConfig(**{**config.to_dict(), "num_labels": 1})),
        "none": BertModel(config),
    }
    return {head: save_checkpoint(model, folder / head.replace(" ", "-")) for head, model in made.items()}


@contextlib.contextmanager
def server_of(models: dict[str, Path]) -> Iterator[str]:
    """The address of a server of what the page on serving serves."""
    for package in ("fastapi", "orjson", "prometheus_client"):
        pytest.importorskip(package, reason='the server is not installed: pip install "pruned_ops[serve]"')
    from pruned_ops.serving.models import Loading, load_all
    from served import served

    sources = [f"sentence-transformers/all-MiniLM-L6-v2={models['none']}", f"rank={models['score']}"]
    with served(load_all(sources, Loading(device="cpu"))) as (url, *_):
        yield url


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs_as_printed(
    number: int, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = blocks("python")[number][1]
    if "sentence_transformers" in source:
        pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    if "int8" in source and (reason := refuse_encoder(stock_model().bert, int8=True)) is not None:
        pytest.skip(reason)
    if "bfloat16" in source and (reason := refuse_encoder(stock_model().bert, bfloat16=True)) is not None:
        pytest.skip(reason)
    for name, head in MODELS.items():
        if "base_url" not in source:
            source = source.replace(f'"{name}"', repr(str(models[head])))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if ADDRESS in source:
            source = source.replace(ADDRESS, stack.enter_context(server_of(models)))
            for package in re.findall(r"^from (\w+) import|^import (\w+)$", source, re.M):
                pytest.importorskip("".join(package), reason="this client is not installed")
        exec(source, names)  # the page's own lines
    if "answer" in names:
        assert isinstance(names["answer"], (Answer, str))
    for several in ("labels", "embeddings", "scores"):
        if several in names:
            assert len(names[several]) == 2


@pytest.mark.parametrize("line", our_command_lines())
def test_commands_and_their_options_exist(line: str) -> None:
    program, command, *_ = shlex.split(line)
    assert options_in(line) <= options_in(help_of(program, command))


def test_options_in_sentences_exist() -> None:
    known = set(OTHERS)
    for program in COMMANDS:
        commands = re.findall(r"^    ([a-z][a-z-]+)(?:\s|$)", help_of(program, ""), re.M)
        known = known.union(*(options_in(help_of(program, command)) for command in ("", *commands)))
    known |= {
        option
        for path in (ROOT / "benchmarks").rglob("*.py")
        for option in options_in(path.read_text(encoding="utf-8"))
    }
    assert {(page, option) for page, code in inline_code() for option in options_in(code) - known} == set()


@pytest.mark.parametrize("line", [line for line in command_lines() if re.match(r"make \w|python \w", line)])
def test_make_targets_and_scripts_exist(line: str) -> None:
    program, *words = [word for word in shlex.split(line) if "=" not in word]
    if program == "make":
        targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
        assert set(words) <= targets
    else:
        script = ROOT / words[0]
        shared = [path for path in (ROOT / "benchmarks").glob("*/*.py") if "results" not in path.parts]
        sources = "".join(path.read_text(encoding="utf-8") for path in (script, *shared))
        assert options_in(line) <= options_in(sources)


def table(page: str, head: str) -> list[list[str]]:
    """The cells of the table under this line."""
    text = PAGES[page].partition(f"\n{head}\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[1:]]


def test_the_families_of_the_page_are_the_codes() -> None:
    rows = table("docs/run.md", "| encoder | `model_type` | pruned |")
    families = {pruned.strip("`"): kinds.replace("`", "").split(", ") for _, kinds, pruned in rows}
    assert families == {family.pruned_type: [one.model_type for one in family.stock] for family in FAMILIES}


def test_the_limits_of_a_server_are_the_codes() -> None:
    on_page = [row[:2] for row in table("docs/serve.md", "| option | default | beyond it |")]
    on_page += re.findall(r"(`--[a-z-]+`)(?: tokens)? \(([\d,]+)\)", PAGES["docs/serve.md"])
    limits = {
        option.split("`")[1][2:].replace("-", "_"): float(text.replace(",", "")) for option, text in on_page
    }
    assert limits == {name: getattr(Limits(), name) for name in limits} and len(limits) == 8


def test_the_defaults_of_a_training_are_the_codes() -> None:
    for options, text, _ in table("docs/choosing.md", "| option | default | what it is |"):
        if options == "`--batch-size`":
            assert text == f"{BATCH_SIZE} (`paper`: {PAPER_BATCH_SIZE})"
            continue
        names = [name.strip("`-").replace("-", "_") for name in options.split(", ")]
        for name, default in zip(names, text.split(", "), strict=True):
            assert getattr(PruneSettings, name) == (False if default == "off" else float(default)), name
    weights = re.findall(r"`--distil-(\w+) ([\d.]+)`", PAGES["docs/choosing.md"])
    assert {name: float(weight) for name, weight in weights} == {
        name: getattr(Distillation(), name) for name in ("task", "logits", "hidden", "temperature")
    }


def anchors(text: str) -> set[str]:
    """The headings of a page as the ends of links, the way GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        if "://" not in target:
            assert path.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: #{anchor}"


def test_paths_and_names_in_sentences_exist() -> None:
    for page, code in inline_code():
        if code.startswith(FOLDERS) and " " not in code:
            assert (ROOT / code).exists(), f"{page}: {code}"
        elif re.match(r"pruned_(ops|trainer)\.\w", code):
            resolve(code.split("(")[0])


def resolve(name: str) -> Any:
    """The object of a dotted name; AssertionError where there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            assert hasattr(value, part), name
            value = getattr(value, part)
        return value
    raise AssertionError(name)


def test_the_api_page_has_every_public_name() -> None:
    shown = re.findall(r"^::: (\S+)$", PAGES["docs/api.md"], re.M)
    for name in shown:
        resolve(name)
    public = {
        f"{package.__name__}.{name}" for package in (pruned_ops, pruned_trainer) for name in package.__all__
    }
    assert public - set(shown) == {"pruned_ops.__version__", "pruned_ops.ops"}


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"README.md", "docs/api.md", "docs/index.md"}))
def test_a_page_says_first_whom_it_is_for_and_what_to_type(page: str) -> None:
    first = PAGES[page].splitlines()[:20]
    assert "This page is for anybody" in " ".join(first)
    assert any(line.startswith("```") for line in first)


def test_the_site_has_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in PAGES if f": {page}\n" not in navigation] == []


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= README_LINES


def test_the_map_says_what_the_packages_say() -> None:
    rows = dict(re.findall(r"^\| `([a-z_/]+)` \| (.*) \|$", PAGES["README.md"], re.M))
    packages = [
        *(ROOT / "pruned_ops").glob("*/__init__.py"),
        *(ROOT / "python/pruned_trainer").glob("*/__init__.py"),
    ]
    for path in packages:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring is not None, path
        first = " ".join(docstring.split("\n\n")[0].split())
        assert rows.get(str(path.parent.relative_to(ROOT))) == first


def test_there_are_some() -> None:
    assert len(our_command_lines()) > 12 and len(blocks("python")) > 8 and len(inline_code()) > 100
