"""Inception-v3 as FID and IS have always used it, for real pictures.

The network of Szegedy et al. 2015 (arXiv 1512.00567) in the variant of TensorFlow's 2015-12-05 graph, from which every
published FID is computed: average pools that leave out the padding, a max pool in the last block, 1008 classes, logits
without their bias. Its names are those of the converted weights that pytorch-fid and torch-fidelity distribute;
docs/tools.md says how their file becomes one of safetensors, outside this tool, which loads no pickles.

Pictures are resized as clean-fid does (Parmar et al. 2022, arXiv 2104.11222): rounded to 8 bits, then PIL's antialiased
bicubic filter on float channels. Figures differ a little from those of TensorFlow's own, aliasing resize.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastsp.errors import UserError
from fastsp.evaluation.features import FeatureModel

SIDE = 299  # pixels
FEATURES, CLASSES = 2048, 1008

Kernel = int | tuple[int, int]
Layer = tuple[str, int, Kernel]  # name, channels out, kernel; stride 1 and padded so that the size stays
Branch = list[list[Layer]]  # a chain of layers, or of several side by side on the same input
_AVERAGE, _MAX, _HALVING = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)


def convolution(inputs: int, outputs: int, kernel: Kernel, stride: int = 1, padded: bool = True) -> nn.Sequential:
    """Convolution without bias, batch normalisation, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, "same" if padded else 0, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs, eps=0.001), relu=nn.ReLU()))


class Mixed(nn.Module):
    """Branches side by side, concatenated over channels.

    The last branch begins with a pool. Where that is `_HALVING`, the last layers of the others have stride 2 and no
    padding too.
    """

    def __init__(self, inputs: int, branches: Sequence[Branch], pool: nn.Module = _AVERAGE) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        for branch in branches:
            channels = inputs
            for position, entry in enumerate(branch):
                halves = pool is _HALVING and position == len(branch) - 1
                for name, outputs, kernel in entry:
                    self.add_module(name, convolution(channels, outputs, kernel, 2 if halves else 1, not halves))
                channels = outputs

    def forward(self, x: Tensor) -> Tensor:
        *branches, last = self.branches
        outputs = [self._run(branch, x) for branch in branches]
        return torch.cat([*outputs, self._run(last, self.pool(x))], 1)

    def _run(self, branch: Branch, x: Tensor) -> Tensor:
        for entry in branch:
            x = torch.cat([self.get_submodule(name)(x) for name, _, _ in entry], 1)
        return x


def _chain(name: str, *layers: tuple[int, Kernel]) -> Branch:
    """Layers ``name_1``, ``name_2``, ... with their channels and kernels."""
    return [[(f"{name}_{number}", *layer)] for number, layer in enumerate(layers, 1)]


_ACROSS, _DOWN = (1, 7), (7, 1)
_DOUBLE = _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))
_SEVEN = _chain("branch7x7x3", (192, 1), (192, _ACROSS), (192, _DOWN), (192, 3))


def _mixed_a(inputs: int, pooled: int) -> Mixed:
    five = _chain("branch5x5", (48, 1), (64, 5))
    return Mixed(inputs, [[[("branch1x1", 64, 1)]], five, _DOUBLE, [[("branch_pool", pooled, 1)]]])


def _mixed_c(inner: int) -> Mixed:
    seven = _chain("branch7x7", (inner, 1), (inner, _ACROSS), (192, _DOWN))
    double = _chain("branch7x7dbl", (inner, 1), (inner, _DOWN), (inner, _ACROSS), (inner, _DOWN), (192, _ACROSS))
    return Mixed(768, [[[("branch1x1", 192, 1)]], seven, double, [[("branch_pool", 192, 1)]]])


def _mixed_e(inputs: int, pool: nn.Module) -> Mixed:
    three, double = _chain("branch3x3", (384, 1)), _chain("branch3x3dbl", (448, 1), (384, 3))
    for branch, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3")):
        branch.append([(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))])
    return Mixed(inputs, [[[("branch1x1", 320, 1)]], three, double, [[("branch_pool", 192, 1)]]], pool)


class InceptionV3(FeatureModel):
    """D = 2048 features of the last pool and K = 1008 logits."""

    def __init__(self, identity: str = "inception") -> None:
        super().__init__()
        self.identity = identity
        self.layers = nn.Sequential(
            OrderedDict(
                Conv2d_1a_3x3=convolution(3, 32, 3, stride=2, padded=False),
                Conv2d_2a_3x3=convolution(32, 32, 3, padded=False),
                Conv2d_2b_3x3=convolution(32, 64, 3),
                pool_1=nn.MaxPool2d(3, 2),
                Conv2d_3b_1x1=convolution(64, 80, 1),
                Conv2d_4a_3x3=convolution(80, 192, 3, padded=False),
                pool_2=nn.MaxPool2d(3, 2),
                Mixed_5b=_mixed_a(192, 32),
                Mixed_5c=_mixed_a(256, 64),
                Mixed_5d=_mixed_a(288, 64),
                Mixed_6a=Mixed(288, [[[("branch3x3", 384, 3)]], _DOUBLE, []], _HALVING),
                Mixed_6b=_mixed_c(128),
                Mixed_6c=_mixed_c(160),
                Mixed_6d=_mixed_c(160),
                Mixed_6e=_mixed_c(192),
                Mixed_7a=Mixed(768, [_chain("branch3x3", (192, 1), (320, 3)), _SEVEN, []], _HALVING),
                Mixed_7b=_mixed_e(1280, _AVERAGE),
                Mixed_7c=_mixed_e(2048, _MAX),
            )
        )
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(resize(images)).mean((2, 3))
        # Without the bias, as in the code from which the published Inception Scores come.
        return features, F.linear(features, self.fc.weight)


def load_inception(path: Path) -> InceptionV3:
    """Inception-v3 with a safetensors file's weights, see the module's text; `UserError` if it holds something else."""
    if not path.is_file():
        raise UserError(
            f"features {path}: no such file; allowed: classifier (for the digits), or a safetensors file with "
            "Inception-v3's weights (docs/tools.md says how to make it)"
        )
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise UserError(f"features {path}: not a safetensors file ({error})") from None
    model = InceptionV3(f"inception-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}")
    for ours, weight in model.state_dict().items():
        theirs = ours.removeprefix("layers.")
        if theirs.endswith("num_batches_tracked"):
            continue  # matters for training only, and the distributed weights have none
        shape = tuple(found[theirs].shape) if theirs in found else "missing"
        if shape != tuple(weight.shape):
            raise UserError(f"features {path}: {theirs} is {shape}; allowed: {tuple(weight.shape)}")
        weight.copy_(found[theirs])
    return model.eval().requires_grad_(False)


def resize(images: Tensor) -> Tensor:
    """Float (N, C, H, W) in [-1, 1] with C one or three -> float32 (N, 3, 299, 299), (x - 128) / 128 of 8 bits."""
    pixels = ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).numpy()
    resized = [
        np.stack([np.asarray(Image.fromarray(c, mode="F").resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for c in p])
        for p in pixels
    ]
    batch = (torch.from_numpy(np.stack(resized)) - 128) / 128
    return batch.expand(-1, 3, -1, -1).to(images.device)
