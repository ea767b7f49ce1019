"""Video decoding: exact frames of a time window."""
