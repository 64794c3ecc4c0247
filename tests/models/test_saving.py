"""Pipeline folders: what was not trained is written as it was read, in its dtype."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny import tiny_flow_pipeline, tiny_stable_diffusion

from fastsp.errors import UserError
from fastsp.models import load_pipeline

KINDS = ("sd15", "sdxl", "sd35", "flux")


def written(folder: Path, kind: str, dtype: torch.dtype, **how: str) -> Path:
    """A folder whose frozen parts have that dtype on disk."""
    made = (tiny_stable_diffusion if kind.startswith(("sd1", "sdx")) else tiny_flow_pipeline)(folder / "plain", kind)
    pipeline = DiffusionPipeline.from_pretrained(made)
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if (part := getattr(pipeline, name, None)) is not None:
            with torch.no_grad():
                for parameter in part.parameters():  # values that bfloat16 does not have
                    parameter.data = (parameter.float() * 1.01).to(dtype)
    pipeline.save_pretrained(folder / "model", **how)
    return folder / "model"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All in a part's folder, by names without a prefix of transformers' older versions."""
    found = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    return {key.removeprefix("text_model."): tensor for key, tensor in found.items()}


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.float32, {}),
        (torch.float16, {"variant": "fp16"}),
        (torch.float16, {"variant": "fp16", "max_shard_size": "20KB"}),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parts_stay_as_they_were(tmp_path, kind, dtype, how):
    source = written(tmp_path, kind, dtype, **how)
    model = load_pipeline(str(source)).for_training()
    replace(model, network=model.network).save(tmp_path / "final")
    names = [*model.kind.parts]
    assert len(names) == {"sd15": 2, "sdxl": 3, "sd35": 4, "flux": 3}[kind]
    for name in names:
        found, expected = tensors(tmp_path / "final" / name), tensors(source / name)
        assert found.keys() == expected.keys() and {tensor.dtype for tensor in found.values()} == {dtype}
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert not [file for file in (tmp_path / "final" / name).iterdir() if "fp16" in file.name]
        config = json.loads((tmp_path / "final" / name / "config.json").read_text())
        assert {config.get(key, "float32") for key in ("dtype", "torch_dtype")} == {"float32"}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "final")
    assert {part.dtype for part in pipeline.components.values() if isinstance(part, torch.nn.Module)} == {torch.float32}
    again = load_pipeline(str(tmp_path / "final"))
    for own, other in zip(again.frozen_parts(), model.frozen_parts(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))


def test_files_that_are_gone_or_changed_are_written_from_memory(tmp_path):
    source = written(tmp_path, "sd35", torch.float32)
    model, before = load_pipeline(str(source)), tensors(source / "vae")
    for name in ("vae", "text_encoder_3"):
        (source / name / "config.json").write_text("{}")
    (source / "text_encoder" / "model.safetensors").unlink()
    model.save(tmp_path / "final")
    found = tensors(tmp_path / "final" / "vae")
    assert all(torch.equal(found[key], before[key]) for key in before)
    assert {t.dtype for t in tensors(tmp_path / "final" / "text_encoder_3").values()} == {torch.bfloat16}
    again = load_pipeline(str(tmp_path / "final"))
    for own, other in zip(again.frozen_parts(), model.frozen_parts(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
    with pytest.raises(UserError):
        load_pipeline(str(source))
