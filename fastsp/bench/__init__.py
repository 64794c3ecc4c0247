"""How fast a step of the self-perceptual loss is, beside the ways in which people would write it. `fastsp bench`."""
