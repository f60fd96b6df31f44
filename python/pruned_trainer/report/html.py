"""A report as one HTML file: the parts of a page, and how they are written. Every text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pruned_ops.files import write_whole
from pruned_trainer.report.figures import DARK, LIGHT, Drawing

_TEMPLATE = files("pruned_trainer.report") / "report.html"


@dataclass(frozen=True)
class Link:
    """A cell that leads to another page beside this one."""

    text: str
    href: str


Cell = str | Link


@dataclass(frozen=True)
class Table:
    """A table whose rows begin with their name. texts: the other cells are texts, not numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    texts: bool = False


@dataclass
class Section:
    """A part of the page. key: its id in the HTML. notes: sentences above all else. code: shown as typed."""

    key: str
    title: str
    notes: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page. headline: (number, what it is) pairs, shown in large type."""

    title: str
    subtitle: str
    headline: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The file's text. It holds its styles and figures, and loads nothing."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = lambda drawing: Markup(drawing.svg)  # matplotlib has escaped its texts
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page, light=LIGHT, dark=DARK)


def write(page: Page, folder: Path) -> list[Path]:
    """Write report.html and its figures as PNG; their paths. Each file appears only when it is whole."""
    drawings = [drawing for section in page.sections for drawing in section.drawings]
    path = folder / "report.html"
    write_whole(path, render(page))
    return [path, *(drawing.save(folder) for drawing in drawings)]
