"""report.html in headless Chromium, where one is installed: each part has a size, nothing is clipped."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reports import FIGURES, SECTIONS, SWEEP, a_report, a_sweep, put

pytest.importorskip("matplotlib")

from pruned_trainer.report.page import write_pages  # noqa: E402  (draws with it)

# Each part's size, how far the page is wider than its frame, texts that leave their figure, and two colours.
MEASURE = """
<iframe id=f style="border:0;width:WIDTHpx;height:9000px" srcdoc="PAGE"></iframe><pre id=found></pre><script>
onload = () => { const d = f.contentDocument, w = f.contentWindow, boxes = {}, outside = [];
  for (const e of d.querySelectorAll("section, figure, tbody")) boxes[e.id || e.tagName] =
    [e.getBoundingClientRect().width, e.getBoundingClientRect().height];
  for (const s of d.querySelectorAll("figure svg")) { const a = s.getBoundingClientRect();
    for (const t of s.querySelectorAll("text")) { const b = t.getBoundingClientRect();
      if (b.left < a.left - 1 || b.right > a.right + 1 || b.top < a.top - 1 || b.bottom > a.bottom + 1)
        outside.push(t.textContent); } }
  const size = parseFloat(w.getComputedStyle(d.querySelector("figure text")).fontSize);
  const svg = d.querySelector("svg"), scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  found.textContent = JSON.stringify({boxes, outside, over: d.documentElement.scrollWidth - WIDTH,
    text: size * scale, page: w.getComputedStyle(d.body).backgroundColor,
    axis: w.getComputedStyle(d.querySelector("#figure-report-speed text")).fill}); }
</script>"""


def seen(folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """What headless Chromium makes of the page in a frame `width` CSS pixels wide."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(names)} is installed")
    text = html.escape((folder / "report.html").read_text(encoding="utf-8"))
    frame = folder / "frame.html"
    frame.write_text("<!DOCTYPE html>" + MEASURE.replace("WIDTH", str(width)).replace("PAGE", text))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    flags.append(f"--user-data-dir={folder / 'browser'}")
    flags.append(f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    done = subprocess.run([browser, *flags, frame.as_uri()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    look = done.stdout.partition('<pre id="found">')[2].partition("</pre>")[0]
    return json.loads(html.unescape(look))


@pytest.mark.parametrize("kind", ["prune", "sweep"])
def test_a_browser_shows_every_part(tmp_path: Path, kind: str) -> None:
    """On a phone and on a desk, light and dark: all parts have a size, nothing is clipped or too wide."""
    folder, parts = put(tmp_path / "out", a_report(layers=12)), [*SECTIONS, *map("figure-{}".format, FIGURES)]
    if kind == "sweep":
        put(put(folder, a_sweep(), "sweep.json") / "macs-0.7", a_report())
        parts = list(SWEEP)
    write_pages(folder)
    looks = [seen(folder, width, dark) for width, dark in ((390, False), (1200, True))]
    for look, width in zip(looks, (390, 1200), strict=True):
        for part in parts:
            wide, high = look["boxes"][part]
            assert wide > 300 and high > 30, part
        assert look["outside"] == [] and look["over"] <= 0
        assert look["text"] > 9, f"{width} pixels wide: texts of the figures are too small"
    assert looks[0]["page"] == "rgb(255, 255, 255)" and looks[1]["page"] == "rgb(21, 24, 28)"
    assert looks[0]["axis"] != looks[1]["axis"]
