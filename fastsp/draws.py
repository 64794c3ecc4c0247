"""Every random number of a training run: pure functions of (seed, stream, sample position).

Position is the index of a sample in the run, never of a rank or a worker, so draws are the same at any world size and
microbatch, and a resumed run needs no state. The generator is counter-based Philox 4x32-10 (`fastsp_kernels.philox`);
t and eps are drawn where they are used, by :func:`fastsp_kernels.diffuse_seeded`.
"""

from __future__ import annotations

from fastsp_kernels import Stream, random_integers, random_normals, random_uniforms
from fastsp_kernels.philox import Seed
from torch import Tensor

from fastsp.schedule import NORMAL_STD, OFFSET, displace


def perceptual_timesteps(
    seed: Seed, positions: Tensor, timesteps: Tensor, num_train_timesteps: int, policy: str = "uniform"
) -> Tensor:
    """t' by one of the policies of Table 4, as :func:`fastsp.schedule.sample_perceptual_timesteps`. (B,) int64."""
    stream = Stream.PERCEPTUAL_TIMESTEP
    if policy == "uniform":
        return random_integers(seed, stream, positions, num_train_timesteps)
    if policy == "normal":
        displacement = NORMAL_STD * random_normals(seed, stream, positions, (1,))[:, 0]
    else:
        displacement = OFFSET * (2.0 * random_integers(seed, stream, positions, 2) - 1.0)
    return displace(timesteps, displacement, num_train_timesteps)


def dropped_captions(seed: Seed, positions: Tensor, probability: float) -> Tensor:
    """Which samples lose their caption. (B,) bool."""
    return random_uniforms(seed, Stream.CAPTION_DROPOUT, positions, 1)[:, 0] < probability


def evaluation_noise(seed: Seed, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Initial noise of the generated images ``indices``, whatever the batch they are made in. (N, *shape) float32."""
    return random_normals(seed, Stream.EVALUATION, indices, shape)
