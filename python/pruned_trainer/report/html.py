"""A report as one HTML page: what it consists of, and the file. Everything that is text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pruned_trainer.report.figures import DARK, LIGHT, Drawing

_TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class Link:
    """A cell that leads to another page beside this one."""

    text: str
    href: str


Cell = str | Link


@dataclass(frozen=True)
class Table:
    """The first cell of a row names it; the others are numbers, or texts where `texts` says so."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    texts: bool = False


@dataclass
class Section:
    """A part of the page. key: its id. notes: sentences above what else there is. code: shown as typed."""

    key: str
    title: str
    notes: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: str = ""


@dataclass(frozen=True)
class Page:
    """headline: (number, what it is) in large type."""

    title: str
    subtitle: str
    headline: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The whole file: styles and figures are in it, and it loads nothing."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = lambda drawing: Markup(drawing.svg)  # ours, with texts that are escaped
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page, light=LIGHT, dark=DARK)


def write(page: Page, folder: Path) -> list[Path]:
    """report.html and its figures as PNG, each there whole or as it was before; their paths."""
    drawings = [drawing for section in page.sections for drawing in section.drawings]
    path = folder / "report.html"
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(render(page), encoding="utf-8")
    temporary.replace(path)
    return [path, *(drawing.save(folder) for drawing in drawings)]
