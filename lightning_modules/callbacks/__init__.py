"""Callbacks: checkpoints, exported stage weights, throughput, and health of a run."""
