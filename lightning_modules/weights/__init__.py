"""Weights in files: the folders that pass between stages, and released weights."""
