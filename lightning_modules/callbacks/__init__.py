"""Callbacks of our runs: checkpoints, exported stage weights, curves, benchmark scores and checks of a run's health."""
