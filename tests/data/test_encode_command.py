"""`fastsp encode` on the command line, with a tiny VAE."""

import typer
from data.helpers import Config, encode, photo, write_tar
from tiny import tiny_stable_diffusion
from typer.testing import CliRunner

from fastsp.cli.encode import encode as command
from fastsp.data.source import open_source

RUN = """
run_dir: {folder}/run
model: {{pretrained: {folder}/model}}
data: {{source: shards, path: {folder}/images.tar, resolution: 32, batch_size: 4}}
stages: [{{name: mse, objective: mse, steps: 1, learning_rate: 1.0e-3}}]
final: mse
"""


def run(folder, *arguments):
    app = typer.Typer()
    app.command()(command)
    config = folder / "run.yaml"
    config.write_text(RUN.format(folder=folder))
    return CliRunner().invoke(app, ["--config", str(config), "--out", str(folder / "latents"), *arguments])


def test_encode(tmp_path):
    assert "no shard at" in str(run(tmp_path).exception), "before the model is looked for"
    members = [
        (f"{index}.{suffix}", content)
        for index in range(5)
        for suffix, content in (("jpg", encode(photo(index, 40, 50))), ("txt", b"a photograph"))
    ]
    write_tar(tmp_path / "images.tar", members)
    assert "no diffusers pipeline folder" in str(run(tmp_path).exception)
    assert "'digits' has no VAE" in str(run(tmp_path, "model={preset: digits}").exception)
    tiny_stable_diffusion(tmp_path / "model")
    result = run(tmp_path)
    assert result.exit_code == 0 and "shard 0: 1 of 1 done, 0 bad samples" in result.output, result.exception
    how = f"train with data.source=latents data.path={tmp_path / 'latents'} data.crop=center data.flip=false"
    assert how in result.output
    config = Config(source="latents", path=str(tmp_path / "latents"), resolution=32)
    assert len(open_source(config, tokenizer=None, channels=3, seed=0)) == 5
    assert "shard 0" not in run(tmp_path).output  # nothing is left to do
    for arguments, message in [
        (["data.flip=true"], "not mirrored; here data.source=shards data.crop=center data.flip=true"),
        (["data.flip=true"], "add data.source=shards data.crop=center data.flip=false"),
        (["data.resolution=64"], "resolution = 32, not 64"),
        (["--dtype", "int8"], "'int8'; allowed: float16"),
    ]:
        assert message in str(run(tmp_path, *arguments).exception)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "00000.tar").write_bytes(b"precious")
    refused = str(run(tmp_path, "--out", str(tmp_path / "pictures")).exception)
    assert "pictures holds other files, such as 00000.tar, and no latents" in refused
    assert [path.read_bytes() for path in (tmp_path / "pictures").iterdir()] == [b"precious"]
    write_tar(tmp_path / "others.tar", members)
    refused = str(run(tmp_path, f"data.path={tmp_path / 'others.tar'}").exception)
    assert "holds latents of pictures with other names; use another folder" in refused
