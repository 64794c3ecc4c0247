"""`fastsp export` from the command line: what is there is kept, and mistakes are one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from export.test_export import finished_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("exported"), "sd1")


def test_export(command, fails, run: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "model.safetensors"
    arguments = ("export", "--run", run, "--out", out, "--single-file", file)
    assert command(*arguments, "--dtype", "fp16").splitlines() == [f"wrote {out}", f"wrote {file}"]
    size = file.stat().st_size
    assert "holds a pipeline already; --force replaces it" in fails(*arguments)
    command(*arguments, "--force")
    assert file.stat().st_size > 1.8 * size  # float32 now
    assert "is there already" in fails("export", "--run", run, "--out", tmp_path / "new", "--single-file", file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "out"]


def test_mistakes(fails, run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    assert "holds no pipeline; choose another folder" in fails(
        "export", "--run", run, "--out", tmp_path / "thesis", "--force"
    )
    out = tmp_path / "out"
    assert "--dtype is 'int8'; allowed: fp32, fp16, bf16" in fails(
        "export", "--run", run, "--out", out, "--dtype", "int8"
    )
    assert "must end in .safetensors" in fails("export", "--run", run, "--out", out, "--single-file", "model.ckpt")
    assert "--transformer-only says what --single-file holds" in fails(
        "export", "--run", run, "--out", out, "--transformer-only"
    )
    file = tmp_path / "model.safetensors"
    assert "--transformer-only is for Stable Diffusion 3 and FLUX" in fails(
        "export", "--run", run, "--out", out, "--single-file", file, "--transformer-only"
    )
    assert "'sq' is no stage" in fails("export", "--run", run, "--out", out, "--stage", "sq")
    assert "does not exist" in fails("export", "--run", tmp_path / "nowhere", "--out", out)
    assert "lies in the run" in fails("export", "--run", run, "--out", run / "final", "--force")
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "thesis.tex"]
