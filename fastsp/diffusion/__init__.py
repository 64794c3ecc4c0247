"""The mathematics of diffusion: noise processes, random draws, sampling."""
