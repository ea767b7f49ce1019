"""Sources of synchronized pairs, one file each."""
