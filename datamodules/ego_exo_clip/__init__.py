"""Ego-ExoClip: synchronized clip-text pairs."""
