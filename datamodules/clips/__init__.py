"""Datasets and data modules that yield batches of clips."""
