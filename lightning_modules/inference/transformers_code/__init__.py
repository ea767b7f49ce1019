"""Exo2Ego as a model of transformers. An exported folder holds a copy of these files and of all that they import."""
