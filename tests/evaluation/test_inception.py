"""Inception-v3's shape and arithmetic; its published weights are not here, so they are made up."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fastsp.errors import UserError
from fastsp.evaluation.inception import InceptionV3, Mixed, load_inception, resize


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    """He-initialised, so that signals neither vanish nor explode, with statistics that are not 0 and 1."""
    torch.manual_seed(0)
    model = InceptionV3()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return model.eval()


@pytest.fixture
def weights(network: InceptionV3, tmp_path: Path) -> Path:
    """As they are distributed: without our prefix and without counters."""
    state = {name.removeprefix("layers."): w for name, w in network.state_dict().items()}
    path = tmp_path / "inception.safetensors"
    save_file({name: w for name, w in state.items() if not name.endswith("tracked")}, path)
    return path


def test_parameters_are_as_many_as_in_the_published_network(network: InceptionV3) -> None:
    """21,785,568 in the trunk, known from torchvision's without its head; 1008 classes instead of 1000 in the head."""
    trunk = sum(p.numel() for p in network.layers.parameters())
    assert (trunk, sum(p.numel() for p in network.fc.parameters())) == (21_785_568, 2049 * 1008)


def test_sizes_on_the_way_are_those_of_the_paper(network: InceptionV3) -> None:
    """Table 1 of arXiv 1512.00567: 149, 147, 147, 73, 73, 71, 35 ... 17 ... 8."""
    x, sizes = torch.zeros(1, 3, 299, 299), []
    with torch.no_grad():
        for layer in network.layers:
            x = layer(x)
            sizes.append((x.shape[1], x.shape[2]))
    assert sizes[:7] == [(32, 149), (32, 147), (64, 147), (64, 73), (80, 73), (192, 71), (192, 35)]
    assert sizes[7:] == [(256, 35), (288, 35), (288, 35)] + [(768, 17)] * 5 + [(1280, 8), (2048, 8), (2048, 8)]


def test_weights_come_back_from_a_file(network: InceptionV3, weights: Path) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loaded = load_inception(weights)
    ours, theirs = network.extract(images), loaded.extract(images)
    assert torch.equal(ours.features, theirs.features) and torch.equal(ours.logits, theirs.logits)
    assert ours.features.shape == (2, 2048) and ours.logits.shape == (2, 1008)
    assert loaded.identity.startswith("inception-") and not any(p.requires_grad for p in loaded.parameters())


def conv(block: Mixed, name: str, x: Tensor, stride: int = 1, padding: tuple[int, int] | int = 0) -> Tensor:
    layer = block.get_submodule(name)
    norm = layer.bn
    y = F.conv2d(x, layer.conv.weight, stride=stride, padding=padding)
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3).relu()


def test_the_last_block_by_hand(network: InceptionV3) -> None:
    """The one with forks and the max pool, which is what makes it the variant of FID."""
    block, x = network.layers.Mixed_7c, torch.randn(1, 2048, 8, 8, generator=torch.Generator().manual_seed(0))
    three = conv(block, "branch3x3_1", x)
    double = conv(block, "branch3x3dbl_2", conv(block, "branch3x3dbl_1", x), padding=1)
    expected = torch.cat(
        [
            conv(block, "branch1x1", x),
            conv(block, "branch3x3_2a", three, padding=(0, 1)),
            conv(block, "branch3x3_2b", three, padding=(1, 0)),
            conv(block, "branch3x3dbl_3a", double, padding=(0, 1)),
            conv(block, "branch3x3dbl_3b", double, padding=(1, 0)),
            conv(block, "branch_pool", F.max_pool2d(x, 3, 1, 1)),
        ],
        1,
    )
    with torch.no_grad():
        assert torch.allclose(block(x), expected, rtol=1e-4, atol=1e-4)


def test_a_halving_block_by_hand(network: InceptionV3) -> None:
    block, x = network.layers.Mixed_6a, torch.randn(1, 288, 35, 35, generator=torch.Generator().manual_seed(0))
    double = conv(block, "branch3x3dbl_2", conv(block, "branch3x3dbl_1", x), padding=1)
    three, double = conv(block, "branch3x3", x, stride=2), conv(block, "branch3x3dbl_3", double, stride=2)
    with torch.no_grad():
        assert torch.allclose(block(x), torch.cat([three, double, F.max_pool2d(x, 3, 2)], 1), rtol=1e-4, atol=1e-4)


def test_resize_gives_the_networks_range_and_three_channels() -> None:
    black, white = resize(torch.full((1, 1, 16, 16), -1.0)), resize(torch.full((1, 3, 16, 16), 1.0))
    assert black.shape == white.shape == (1, 3, 299, 299)
    assert torch.allclose(black, torch.tensor(-1.0)) and torch.allclose(white, torch.tensor(127 / 128))


def test_resize_does_not_alias() -> None:
    """A fine checkerboard, made ten times smaller, is grey; a filter that skips pixels keeps black and white."""
    board = (torch.arange(2990)[:, None] + torch.arange(2990)) % 2 * 2.0 - 1.0
    assert resize(board[None, None]).std() < 0.01


def test_other_files_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; allowed: classifier.*docs/tools\.md"):
        load_inception(tmp_path / "nothing.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not this")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_inception(broken)
    other = tmp_path / "other.safetensors"
    save_file({"fc.weight": torch.zeros(1000, 2048)}, other)
    with pytest.raises(UserError, match=r"Conv2d_1a_3x3.conv.weight is missing; allowed: \(32, 3, 3, 3\)"):
        load_inception(other)
