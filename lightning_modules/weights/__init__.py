"""Weights in files: those that stages leave for each other, and released weights of others."""
