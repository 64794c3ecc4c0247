"""Random access to the samples of a data set: folders of images, tar shards, latents, the digits."""
