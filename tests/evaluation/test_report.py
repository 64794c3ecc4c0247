"""The report: complete, self-contained, escaped, and the same with parts missing."""

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from evaluation.runs import CONFIG, HOSTILE, write_run
from PIL import Image

from fastsp.errors import UserError
from fastsp.evaluation.report import write_report
from fastsp.evaluation.report.page import loss_curve


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.tags)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", captions=[HOSTILE, "a handwritten two"])


def test_everything_of_a_finished_run_is_there(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    assert page.count("img") == 10 + 3 and page.count("table") == 3, "images, loss curves"
    for text in ("32.68 / 22.20", "24.42 / 28.07", "0.00 / 35.28", "Self-perceptual is better", "a handwritten two"):
        assert text in page.text, text
    assert "learning_rate: 0.0001" in page.text and "CPU, 2 cores" in page.text and "5 min 20 s" in page.text


def test_the_paper_s_figures_are_beside_those_of_the_same_metrics(run_dir: Path) -> None:
    headings = re.findall(r"<th>([^<]*)</th>", write_report(run_dir).read_text(encoding="utf-8"))
    place = headings.index("Paper: FID / IS")
    assert headings[place - 2 : place] == ["FID ↓", "IS ↑"] and "KID x 1000 ↓" in headings


def test_nothing_is_loaded_from_elsewhere(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    sources = [attrs["src"] for _, attrs in page.tags if "src" in attrs]
    assert len(sources) == 13 and all(source.startswith("data:image/png;base64,") for source in sources)
    links = {attrs["href"] for _, attrs in page.tags if "href" in attrs}
    assert links == {f"samples/{file.name}" for file in (run_dir / "samples").iterdir()}
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "url(" not in html and "@import" not in html and "default-src 'none'" in html


def test_large_images_are_embedded_smaller_and_the_full_ones_linked(run_dir: Path) -> None:
    """Noise, which compresses worst. A run of Stable Diffusion has grids of 2,600 pixels, trajectories of 12,800."""
    noise, samples = Image.effect_noise((6400, 1600), 90).convert("RGB"), run_dir / "samples"
    for stage in ("mse", "sp"):
        noise.save(samples / f"trajectory_{stage}.png", compress_level=1)
        noise.resize((2400, 2000)).save(samples / f"{stage}_final.png", compress_level=1)
    full = sum(file.stat().st_size for file in samples.iterdir())
    page = Page(write_report(run_dir))
    assert full > 40e6 and (run_dir / "report.html").stat().st_size < 3e6
    links = {attrs.get("href") for _, attrs in page.tags}
    assert "full size, 6400" in page.text and "samples/trajectory_sp.png" in links
    uri = next(attrs["src"] for _, attrs in page.tags if attrs.get("alt", "").endswith("steps, Self-perceptual"))
    kind, content = uri.split(",")
    with Image.open(io.BytesIO(base64.b64decode(content))) as shown:
        assert (kind, shown.size) == ("data:image/jpeg;base64", (1800, 450))


@pytest.mark.parametrize("enabled", [False, True])
def test_a_finished_run_without_scores_says_why(run_dir: Path, enabled: bool) -> None:
    (run_dir / "evaluation.json").unlink()
    (run_dir / "config.yaml").write_text(json.dumps({**CONFIG, "evaluation": {"enabled": enabled}}))
    page = Page(write_report(run_dir))
    said = "There are no scores yet" if enabled else "The evaluation is off (evaluation.enabled: false)"
    assert page.text.count(said) == 2, "in the headline and in place of the table"


def test_hostile_text_is_shown_as_text(run_dir: Path) -> None:
    config = {**CONFIG, "note": HOSTILE}
    (run_dir / "config.yaml").write_text(json.dumps(config))
    (run_dir / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    rows = json.loads((run_dir / "evaluation.json").read_text())
    (run_dir / "evaluation.json").write_text(json.dumps([{**row, "features": HOSTILE} for row in rows]))
    shutil.copy(run_dir / "samples" / "sp_final.png", run_dir / "samples" / "<script>_final.png")
    page = Page(write_report(run_dir))
    assert page.count("script") == 0 and not any("onerror" in attrs for _, attrs in page.tags)
    assert page.text.count('document.title="owned"') >= 4


PARTS = ("config.yaml", "metrics.jsonl", "evaluation.json", "environment.json", "samples")


@pytest.mark.parametrize("missing", [*((part,) for part in PARTS), PARTS])
def test_a_report_of_an_unfinished_run(run_dir: Path, missing: tuple[str, ...]) -> None:
    for part in missing:
        path = run_dir / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_report(run_dir))
    assert page.text.count("Self-perceptual") > 0 or "config.yaml" in missing
    assert any(attrs.get("class") == "missing" for _, attrs in page.tags)


def test_a_line_cut_off_by_a_kill_ends_the_curve(run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-30])
    assert Page(write_report(run_dir)).count("img") == 13


@pytest.mark.parametrize("name", ["evaluation.json", "config.yaml", "environment.json"])
def test_broken_files_are_named(run_dir: Path, name: str) -> None:
    (run_dir / name).write_text("{[")
    with pytest.raises(UserError, match=rf"{re.escape(name)} is broken") as caught:
        write_report(run_dir)
    assert "\n" not in str(caught.value) and not (run_dir / "report.html").exists()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        write_report(tmp_path / "nowhere")


def test_stages_of_other_names(run_dir: Path) -> None:
    """A run of one's own, without control, has a table and says why there is no verdict."""
    rows = [row for row in json.loads((run_dir / "evaluation.json").read_text()) if row["stage"] != "mse_longer"]
    (run_dir / "evaluation.json").write_text(json.dumps(rows))
    (run_dir / "config.yaml").write_text(json.dumps({**CONFIG, "stages": CONFIG["stages"][:2]}))
    page = Page(write_report(run_dir))
    assert "there is no fair comparison" in page.text and page.count("table") == 2


def test_a_run_without_the_loss_is_not_asked_whether_it_helped(run_dir: Path) -> None:
    asked = "Did the self-perceptual loss help?"
    assert asked in Page(write_report(run_dir)).text
    mse = [stage for stage in CONFIG["stages"] if stage["objective"] == "mse"]
    (run_dir / "config.yaml").write_text(json.dumps({**CONFIG, "stages": mse}))
    page = Page(write_report(run_dir))
    assert asked not in page.text and "verdict" not in {attrs.get("class") for _, attrs in page.tags}
    assert page.count("table") == 2, "its scores are there"


def test_curves_survive_what_is_not_a_number() -> None:
    assert loss_curve([{"step": 10, "loss": float("nan")}, {"step": 20, "loss": float("inf")}]) is None
    for losses in ([0.5] * 5000, [1e-9, float("nan"), 1e9], [0.3]):
        uri = loss_curve([{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)])
        assert uri is not None
        with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as chart:
            colours = chart.convert("RGB").getcolors(1 << 16)
        assert (0x24, 0x57, 0xC5) in {colour for _, colour in colours}, "there is a curve"


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.995, "has won: right in 100% of the cases"),
        (0.8, "is right in 80% of the cases"),
        (0.5, "has collapsed: right in 50%"),
        (math.nan, "has collapsed: its scores are no numbers"),
    ],
)
def test_a_critic_that_has_won_or_collapsed_is_named(run_dir: Path, accuracy: float, words: str) -> None:
    """By the last quarter of its stage."""
    file = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["stage"] == "sp":
            at = accuracy if line["step"] > 750 else 0.7
            line |= {"critic_loss": 0.6, "critic_accuracy": at, "critic_gap": at - 0.6}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(run_dir))
    assert f"The critic {words}" in page.text and page.text.count("The critic of sp") == 1
    assert page.count("img") == 10 + 3 + 2, "accuracy and gap"
