"""What imports `fastsp.data` without pictures works where DALI, nvImageCodec and simplejpeg are not installed."""

import os
import subprocess
import sys

import torch
from data.helpers import write_tar
from safetensors.torch import save

from fastsp.data.readers.latents import LatentsHeader
from fastsp.errors import install_command

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in ("nvidia.dali", "nvidia.nvimgcodec", "simplejpeg"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def run(code: str, cache) -> str:
    environment = os.environ | {"FASTSP_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_everything_can_be_imported(tmp_path):
    modules = ("fastsp.training.trainer", "fastsp.evaluation.run", "fastsp.data.encode", "fastsp.data.check")
    assert run(f"import {', '.join(modules)}; print('imported')", tmp_path) == "imported"


def test_latents_need_no_library_of_pictures(tmp_path):
    header = LatentsHeader("vae", "0", 16, "float32", (8, 2, 2), None, source_samples=2, samples_per_shard=2)
    header.save(tmp_path / "latents")
    sample = save({**header.placeholder(), "crop_offset": torch.zeros(2, dtype=torch.int64)})
    members = [
        (f"{key}.{suffix}", content) for key in "ab" for suffix, content in (("safetensors", sample), ("txt", b"x"))
    ]
    write_tar(tmp_path / "latents" / "00000.tar", members)
    code = f"""
from fastsp.data.config import DataConfig
from fastsp.data.source import open_source
config = DataConfig(source="latents", path={str(tmp_path / "latents")!r}, resolution=16, batch_size=2)
source = open_source(config, tokenizer=None, channels=3, seed=0)
batch = next(source.batches(batch_size=2, last_position=2))
print(batch.weights.tolist(), tuple(batch.moments.shape))
"""
    assert run(code, tmp_path) == "[1.0, 1.0] (2, 8, 2, 2)"


def test_pictures_ask_for_them_by_name(tmp_path):
    code = """
from fastsp.data.config import DataConfig
from fastsp.data.source import open_source
from fastsp.errors import UserError
for source in ("digits", "images", "shards"):
    try:
        config = DataConfig(source=source, path="x", resolution=16, batch_size=2)
        open_source(config, tokenizer=None, channels=3, seed=0)
    except UserError as error:
        print(error)
"""
    expected = f"pictures need nvidia-dali-cuda130, which is not installed; {install_command('train')}"
    assert run(code, tmp_path).splitlines() == [expected] * 3
