"""report.html: every part is there, it loads nothing, texts are texts, and it says what a report lacks."""

from __future__ import annotations

import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pruned_trainer.cli import main
from pruned_trainer.jobs.prune import _draw
from pruned_trainer.report.fields import Fields, change_text, scores_of
from pruned_trainer.report.published import data_set_of
from pruned_trainer.report.terminal import _change, print_sweep
from pruned_trainer.tasks.task import Score
from reports import FIGURES, SECTIONS, SWEEP, a_report, a_sweep, gate_log, put

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure  # noqa: E402

from pruned_trainer.report import figures  # noqa: E402
from pruned_trainer.report.page import write_pages  # noqa: E402  (draws with it)

VOID = {"meta", "link", "br", "img", "hr", "input"}
PNG = b"\x89PNG\r\n\x1a\n"
NASTY = "<script>alert('x')</script> & \"<b>$x_1$\""


class Parsed(HTMLParser):
    """ids, attributes, tags and the text of each section of a page; every tag is closed in its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.texts: dict[str, str] = {"": ""}
        self._open: list[str] = []
        self._section = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "section":
            self._section = str(values["id"])
            self.texts[self._section] = ""
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._section] += " ".join(data.split()) + "\n"


def page(folder: Path) -> Parsed:
    write_pages(folder)
    return Parsed(folder / "report.html")


def test_every_part_of_a_pruned_model_s_page(tmp_path: Path) -> None:
    folder = put(tmp_path / "out", a_report())
    written = [path.name for path in write_pages(folder)]
    assert written == ["report.html", *(f"{name}.png" for name in FIGURES)]
    assert {path.name for path in folder.iterdir()} == {"report.json", *written}
    parsed = Parsed(folder / "report.html")
    assert set(SECTIONS) | {f"figure-{name}" for name in FIGURES} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids)) and "absent" not in parsed.ids
    for section, texts in {
        "scores": ("71.25", "70.75", "-0.50 (-1.75 to +0.25)", "span F1", "8.00 M", "0.500 of dense"),
        "layers": ("heads: 3 of 36", "FFN width: 300 of 4608"),
        "training": ("FFN units", "share of the gates open", "wanted", "decided: 0.499"),
        "speed": ("(K80, batch 1)", "RTX 3090", "arXiv 1910.06360", "1.95x 83.2", "ours: F1"),
        "speeds": ("arrival-b8", "140.5", "69.5", "1.99x", "113.5"),
        "backends": ("linear_gelu", "reference", "cpu"),
        "machine": ("A Processor (7)", "accelerator", "none"),
        "versions": ("2.13.0",),
        "plan": ("77", "1.50 s each", "42.1"),
        "command": ("pruned-trainer prune --macs 0.5",),
    }.items():
        for text in texts:
            assert text in parsed.texts[section].replace("\u00a0", " "), (section, text)


def test_nothing_lost_is_written_without_a_minus(tmp_path: Path) -> None:
    report = a_report() | {"f1_loss": 0.0, "f1_loss_interval": [0.0, 0.004]}
    wanted = "+0.00 (+0.00 to +0.00)"
    assert wanted in page(put(tmp_path / "out", report)).texts["scores"]
    assert _change(report, "F1", "f1_loss") == "F1 [bold]+0.00[/] points (95% interval +0.00 to +0.00)"


@pytest.mark.parametrize("kind", ["prune", "sweep"])
def test_nothing_is_loaded_from_elsewhere(tmp_path: Path, kind: str) -> None:
    folder = put(tmp_path / "out", a_report())
    if kind == "sweep":
        put(put(tmp_path / "out", a_sweep(), "sweep.json") / "macs-0.7", a_report())
    parsed = page(folder)
    assert "script" not in parsed.tags and not parsed.tags & {"link", "iframe", "object", "embed", "img"}
    for name, value in parsed.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert value.startswith(("#", "./macs-0.7/")), (name, value)
    assert parsed.source.count("url(") == parsed.source.count("url(#")
    assert "@import" not in parsed.source and "://" not in parsed.source
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in parsed.attributes


def test_the_figures_take_the_page_s_colours_and_refer_to_themselves(tmp_path: Path) -> None:
    parsed = page(put(tmp_path / "out", a_report()))
    names = {value[1:] for name, value in parsed.attributes if name == "xlink:href"}
    assert names and names <= set(parsed.ids)
    style, _, body = parsed.source.partition("</style>")
    assert "var(--first)" in body and "#0072b2" in style and "#0072b2" not in body
    assert "prefers-color-scheme: dark" in style and 'name="viewport"' in style
    for name in FIGURES:
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(PNG)


def test_texts_are_escaped(tmp_path: Path) -> None:
    report = a_report(command=NASTY, recipe=NASTY)
    report["machine"][NASTY] = NASTY
    report["evaluated_on"]["file"] = report["speedup"]["workload"] = NASTY
    for name in ("dense", "pruned"):
        report[name]["workloads"] = {NASTY: {"ms": {"p50": 1.0}, "backends": {NASTY: NASTY}}}
    report["target"]["asked"] = {NASTY: 1.0}
    parsed = page(put(tmp_path / "out", report))
    assert "script" not in parsed.tags and "b" in parsed.tags and "<b>$" not in parsed.source
    for section in ("", "machine", "backends", "speeds", "command"):
        assert NASTY in parsed.texts[section], section
    folder = '"><img src=x onerror=alert(1)>'
    family = put(tmp_path / "family", a_sweep(folders=(folder, "b&b")), "sweep.json")
    put(family / folder, a_report())
    parsed = page(family)
    assert "img" not in parsed.tags and folder in parsed.texts["models"] and "b&b" in parsed.texts["models"]


def test_a_family_s_page_has_the_curve_and_a_row_for_each_model(tmp_path: Path) -> None:
    folder = put(tmp_path / "out", a_sweep(), "sweep.json")
    for name in ("macs-0.7", "macs-0.5"):
        put(folder / name, a_report())
    parsed = page(folder)
    assert set(SWEEP) <= set(parsed.ids)
    models = parsed.texts["models"]
    for text in ("dense", "macs-0.7", "1.50x", "macs-0.5", "2.50x", "-0.50 (-1.75 to +0.25)", "macs 0.4987"):
        assert text in models
    assert ("href", "./macs-0.7/report.html") in parsed.attributes
    assert "pruned-trainer sweep --macs 0.7 0.5" in parsed.texts["command"]
    assert "from the model macs-0.7" in parsed.texts["backends"] and "on arrival-b8" in models
    assert (folder / "sweep.png").read_bytes().startswith(PNG)
    assert "scores" in Parsed(folder / "macs-0.5" / "report.html").ids
    # The models' folders may be gone: what only they knew is named.
    for name in ("macs-0.7", "macs-0.5"):
        shutil.rmtree(folder / name)
    parsed = page(folder)
    assert "machine" in parsed.texts["absent"] and {"curve", "models", "speed"} <= set(parsed.ids)


def test_natural_questions_have_their_own_scores_and_peers(tmp_path: Path) -> None:
    parsed = page(put(tmp_path / "out", a_report("natural_questions")))
    assert "long F1" in parsed.texts["scores"] and "short F1" in parsed.texts["scores"]
    assert "span F1" not in parsed.source and "nn_pruning" not in parsed.source
    assert (
        "RoBERTa-large, short F1" in parsed.texts["speed"]
        and "(V100, fp16, batch 64)" in parsed.texts["speed"]
    )
    # The paper's numbers are the official evaluator's, at the threshold that is best on what it evaluates.
    assert "batch 64\nshort F1, best threshold\n58.8" in parsed.texts["speed"]
    put(tmp_path / "family", a_sweep("natural_questions"), "sweep.json")
    parsed = page(tmp_path / "family")
    assert "long F1" in parsed.texts["models"] and "short F1" in parsed.texts["curve"]


def test_no_two_series_of_a_figure_look_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Natural Questions have four of ours beside two of others; a caller's metrics may be more."""
    fills: list[Any] = []
    monkeypatch.setattr(figures, "draw", lambda name, alt, height, fill: fills.append(fill))
    for own, others in ((4, 2), (9, 0)):
        owners = [True] * own + [False] * others
        lines = [figures.Line(f"series {n}", [(1.5, n)], own=of_us) for n, of_us in enumerate(owners)]
        figures.against_speed("report-speed", "points gained", lines, joined=False)
        figure = Figure(layout="constrained")
        fills.pop()(figure)
        markers = [line for line in figure.axes[0].get_lines() if line.get_marker() in tuple("osD^v")]
        assert len({(line.get_color(), line.get_marker()) for line in markers}) == len(markers) == len(lines)


def test_scores_that_do_not_move_are_drawn_on_axes_of_some_points(monkeypatch: pytest.MonkeyPatch) -> None:
    fills: list[Any] = []
    monkeypatch.setattr(figures, "draw", lambda name, alt, height, fill: fills.append(fill))
    for points in ([(2.0, 0.0)], [(2.0, 0.0), (4.0, -9.0)]):
        lines = [figures.Line(name, points, [(y, y) for _, y in points]) for name in ("accuracy", "F1")]
        figures.against_speed("report-speed", "points gained", lines, joined=False)
        figure = Figure(layout="constrained")
        fills.pop()(figure)
        (left, right), (low, high) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
        assert right - left >= 1 and high - low >= 2
        assert all(left < x < right and low < y < high for x, y in points)


@pytest.mark.parametrize(
    ("absent", "named"),
    [
        (
            ["shape", "machine", "command", "plan", "training.minutes"],
            ["layer", "machine", "command", "steps and time"],
        ),
        (["dense_shape", "training.gates", "versions", "task", "recipe"], ["layer", "versions"]),
        (["speedup", "f1_loss", "f1_span_loss_interval", "pruned.workloads", "evaluated_on"], []),
        (["dense", "hidden_size", "target", "training"], []),
        ([name for name in a_report() if name != "dense"], ["layer", "machine", "command", "versions"]),
    ],
)
def test_what_a_report_lacks_is_left_out_or_said(tmp_path: Path, absent: list[str], named: list[str]) -> None:
    """Reports of earlier versions have fewer fields."""
    report = a_report()
    for field in absent:
        place, _, name = field.rpartition(".")
        del (report[place] if place else report)[name]
    parsed = page(put(tmp_path / "out", report))
    for name in named:
        assert name in parsed.texts["absent"]
        assert name not in parsed.ids
    assert ("absent" in parsed.ids) == bool(named)
    if "training.gates" in absent:
        assert "no log of gates" in parsed.texts["training"] and "figure-report-gates" not in parsed.ids
    if "speedup" in absent:
        assert "lacks its speed-up" in parsed.texts["speed"]


@pytest.mark.parametrize(
    ("data_set", "beside"),
    [
        ("SQuAD 2.0", {"McCarley", "nn_pruning"}),
        ("SQuAD 1.1", {"nn_pruning", "CoFi"}),
        (None, set()),  # the demo's generated questions, or anybody's own
    ],
)
def test_others_points_stand_beside_the_same_data_alone(
    tmp_path: Path, data_set: str | None, beside: set[str]
) -> None:
    report = a_report()
    report["evaluated_on"]["data_set"] = data_set
    parsed = page(put(tmp_path / "out", report))
    text = parsed.texts["speed"]
    assert {name for name in ("McCarley", "nn_pruning", "CoFi") if name in text} == beside
    assert "ours: F1" in text and ("No published results stand beside these" in text) == (not beside)
    assert text.count("SQuAD 1.1") == 0 or data_set == "SQuAD 1.1"


def test_a_data_set_is_known_by_its_questions_ids() -> None:
    own = {"56ddde6b9a695914005b9628": "a", "5a7db48670df9f001a87505f": ""}
    assert data_set_of("squad", own, {"NoAns_total": 1}) == "SQuAD 2.0"
    assert data_set_of("squad", own, {}) == "SQuAD 1.1"
    assert (
        data_set_of("squad", {**own, "test-00001": "b"}, {}) is None and data_set_of("squad", {}, {}) is None
    )
    documents = {"predictions": [{"example_id": -1665528830781573810}]}
    assert data_set_of("natural_questions", documents, {}) == "Natural Questions"
    assert data_set_of("natural_questions", {"predictions": [{"example_id": 7}]}, {}) is None


def test_runs_without_gates_or_without_a_target_held(tmp_path: Path) -> None:
    """The paper's recipe trains one part after another, towards no target; importance trains no gates."""
    log = gate = []
    for part, full in (("heads", 12), ("ffn", 1536)):
        log = [{"step": s, f"open_{part}/layer_0": full / s, f"open_{part}": 1 / s} for s in (1, 2, 4)]
        gate = [*gate, *log, {"step": 4}]
    training = {"gates": gate, "retrain": []}
    parsed = page(put(tmp_path / "paper", a_report(training=training, target={"asked": {}, "reached": {}})))
    assert "FFN units" in parsed.texts["training"] and "No target was held" in parsed.texts["training"]
    assert "figure-report-target" not in parsed.ids
    shares = [{**entry, "expected": 0.5, "wanted": 0.5} for entry in gate]
    held = a_report(training={"gates": shares, "retrain": []}, recipe="paper")
    parsed = page(put(tmp_path / "held", held))
    assert "held to its share of the target" in parsed.texts["training"]
    assert "figure-report-target" not in parsed.ids
    training = {"gates": [], "retrain": []}
    parsed = page(put(tmp_path / "gain", a_report(training=training, recipe="gain")))
    assert "The recipe gain trains no gates" in parsed.texts["training"]
    assert not (tmp_path / "gain" / "report-gates.png").exists()


def test_the_layers_of_a_resumed_training_are_drawn_in_their_order(tmp_path: Path) -> None:
    """Its log goes on from a checkpoint's, in which the names are sorted as texts."""
    counts = {f"open_heads/layer_{i}": i + 1.0 for i in range(12)}
    log = [dict(sorted({**counts, "step": step}.items())) for step in (5, 10)]
    assert list(log[0]).index("open_heads/layer_10") < list(log[0]).index("open_heads/layer_2")
    parsed = page(put(tmp_path / "out", a_report(layers=12, training={"gates": log, "retrain": []})))
    shares = ", ".join(f"{(i + 1) / 12:.2f}" for i in range(12))
    assert f"heads at the end: {shares}" in parsed.source


def test_a_gradual_sweep_s_pages_draw_the_training_of_their_model(tmp_path: Path) -> None:
    """The log has that of every target; a family's page draws the largest model's."""
    second = [{**e, "wanted": e["wanted"] / 2, "expected": 0.3} if "wanted" in e else e for e in gate_log(3)]
    training = {"gates": gate_log(3) + second, "retrain": []}
    family = a_sweep(folders=("macs-0.5", "macs-0.25"))
    for cost, number in ((0.499, 0), (0.249, 1)):
        target = {"asked": {"macs": cost}, "reached": {"macs": cost}}
        family["points"][number]["target"] = target
        folder = tmp_path / "family" / family["points"][number]["folder"]
        parsed = page(put(folder, a_report(training=training, target=target)))
        wanted = ("0.500", "0.250")[number]
        assert f"trained anew for each target; the training towards {wanted}" in parsed.texts["training"]
        assert f"{wanted} wanted" in parsed.source and f"decided: {cost}" in parsed.texts["training"]
    parsed = page(put(tmp_path / "family", family, "sweep.json"))
    assert "the training towards 0.500" in parsed.texts["training"]
    assert "decided: 0.499" in parsed.texts["training"] and "0.249" not in parsed.texts["training"]


def test_a_dense_model_that_was_pruned_before_is_counted_as_it_is(tmp_path: Path) -> None:
    report = a_report()
    heads, widths = (2, 12, 5), (96, 1536, 400)
    report["dense_shape"]["layers"] = [
        {"num_heads": h, "ffn_width": w} for h, w in zip(heads, widths, strict=True)
    ]
    counts: dict[str, Any] = {"heads": heads, "ffn": [width / 2 for width in widths]}
    open_gates = {f"open_{part}/layer_{i}": n for part in counts for i, n in enumerate(counts[part])}
    report["training"]["gates"] = [{"step": 5, **open_gates}]
    parsed = page(put(tmp_path / "out", report))
    assert "heads at the end: 1.00, 1.00, 1.00; FFN units at the end: 0.50, 0.50, 0.50" in parsed.source
    assert "heads: 3 of 19" in parsed.texts["layers"] and "FFN width: 300 of 2032" in parsed.texts["layers"]
    assert "The widest dense layers have 12 heads" in parsed.texts["layers"]
    assert "heads 19 3 0.158 of dense" in " ".join(parsed.texts["scores"].split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speedup": 2.0}, "speedup is 2.0; an object is needed"),
        ({"f1_loss": "much"}, "f1_loss is 'much'; a finite number is needed"),
        ({"f1_loss": float("nan")}, "report.json is no JSON: 'NaN' is no finite number: line"),
        ({"f1_loss": 10**400}, "is no finite number: line"),
        ({"f1_loss_interval": [1]}, "f1_loss_interval is [1]; a pair of numbers"),
        ({"shape": [{"num_heads": [], "ffn_width": 1}]}, "shape[0].num_heads is []; a finite number"),
        ({"shape": [{"num_heads": 1.5, "ffn_width": 1}]}, "shape[0].num_heads is 1.5; a count is needed"),
        ({"hidden_size": -1}, "hidden_size is -1; a count"),
        ({"task": "translation"}, "task is 'translation'; one of squad, natural_questions is needed"),
        ({"dense": None, "pruned": None}, "no entry dense or pruned"),
        ({"command": ["a"]}, "command is ['a']; a text is needed"),
    ],
)
def test_wrong_fields_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    folder = put(tmp_path / "out", {**a_report(), **changes})
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and "report.json" in error and error.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_folders_that_hold_no_report_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "report.json").write_text("no JSON")
    put(tmp_path / "list", [1])
    put(tmp_path / "up", a_sweep(folders=("../list",)), "sweep.json")
    put(tmp_path / "none", {"task": "squad", "points": []}, "sweep.json")
    for name, message in (
        ("", "holds no report.json and no sweep.json"),
        ("missing", "missing is no folder"),
        ("text", "report.json is no JSON"),
        ("list", "report.json holds a list"),
        ("up", "points[0].folder is '../list'"),
        ("none", "has no points"),
    ):
        assert main(["report", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    put(tmp_path / "good", a_report())
    assert main(["report", str(tmp_path / "good")]) == 0
    assert "report.html" in capsys.readouterr().out


def test_a_run_ends_well_where_nothing_can_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pruned_trainer.report.page", None)
    _draw(put(tmp_path / "out", a_report()))
    assert "no report.html" in capsys.readouterr().out and not (tmp_path / "out" / "report.html").exists()


def test_a_score_of_a_family_is_shown_without_its_interval() -> None:
    lines = [Score("f1", "F1").to_json(), Score("f1_span", "span F1").to_json()]
    point = {"folder": "macs-0.5", "speedup": {"reached": 2.0}, "f1": 61.5, "f1_loss": 1.25, "f1_span": None}
    intervals = {"f1_loss_interval": None, "f1_span_loss": None, "f1_span_loss_interval": None}
    console = Console(record=True, width=120)
    dense = {"f1": 62.75, "f1_span": None}
    print_sweep({"score_lines": lines, "dense": dense, "points": [point | intervals]}, console)
    row = next(line for line in console.export_text().splitlines() if "macs-0.5" in line)
    assert [cell.strip() for cell in row.split("\u2502")[2:-1]] == ["2.00", "61.50", "1.25", "-", ""]


def test_a_change_without_an_interval_is_shown_alone() -> None:
    """A metric may have no value on samples of the rows, and a known loss all the same."""
    report = a_report(f1_loss_interval=None)
    (score, *_) = scores_of(Fields(Path("report.json"), report))
    assert change_text(Fields(Path("report.json"), report), score) == "-0.50"
    assert _change(report, "F1", "f1_loss") == "F1 [bold]-0.50[/] points"
    assert _change(report, "span F1", "f1_span_loss").endswith(" points (95% interval -1.75 to +0.25)")
