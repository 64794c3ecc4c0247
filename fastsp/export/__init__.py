"""A run's model in the layouts that other programs read."""
