"""The report in a real browser, where there is one: scripts, pictures, and the width of a phone."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
from evaluation.runs import HOSTILE, write_run

from fastsp.evaluation.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=4000"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

# Runs in a page that holds the report in a frame of the wanted width, and leaves its findings in that page's title.
PROBE = """
<!doctype html><meta charset=utf-8><title>not yet</title>
<iframe width={width} height=800 style="border:0" srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe"), errors = [];
window.addEventListener("error", e => errors.push(e.message));
frame.addEventListener("load", () => {{
  const inside = frame.contentDocument, pictures = [...inside.images];
  document.title = JSON.stringify({{
    errors, title: inside.title, scripts: inside.scripts.length, pictures: pictures.length,
    broken: pictures.filter(p => !p.naturalWidth).length,
    overflow: inside.documentElement.scrollWidth - inside.documentElement.clientWidth,
    unreadable: [...inside.querySelectorAll("p, td, dd, li")].filter(
      e => e.textContent.trim() && e.offsetParent && parseFloat(getComputedStyle(e).fontSize) < 12).length,
    captions: [...inside.querySelectorAll(".captions li")].map(li => li.textContent),
  }});
}});
</script>
"""


def findings(run_dir: Path, width: int, tmp_path: Path) -> dict:
    """What the browser saw of the run's report in a window of `width` CSS pixels."""
    # The report's own policy forbids scripts; the probe lives outside it, so the report is shown unchanged.
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    probe = tmp_path / f"probe{width}.html"
    probe.write_text(PROBE.format(width=width, page=escape(page)), encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width + 40},900"]
    shown = subprocess.run([*command, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", shown.stdout, re.DOTALL)
    assert title, shown.stderr
    return json.loads(unescape(title[1]))


@pytest.mark.parametrize("width", [390, 1280])
def test_report_in_a_browser(width: int, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", captions=[HOSTILE, "a handwritten two"])
    write_report(run_dir)
    seen = findings(run_dir, width, tmp_path)
    assert seen["captions"] == [HOSTILE, "a handwritten two"]
    assert (seen["errors"], seen["scripts"], seen["title"]) == ([], 0, "run · fastsp report")
    assert (seen["pictures"], seen["broken"]) == (13, 0)
    assert (seen["overflow"], seen["unreadable"]) == (0, 0)


def test_the_probe_can_fail(tmp_path: Path) -> None:
    """A broken picture and a paragraph wider than the window are seen."""
    run_dir = write_run(tmp_path / "run")
    report = write_report(run_dir)
    damage = '<div style="width: 3000px">wide</div><img src="data:image/png;base64,AAAA">'
    report.write_text(report.read_text(encoding="utf-8").replace("</main>", f"{damage}</main>"), encoding="utf-8")
    seen = findings(run_dir, 390, tmp_path)
    assert seen["broken"] == 1 and seen["overflow"] > 300
