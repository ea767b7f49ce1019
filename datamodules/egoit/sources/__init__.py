"""The sources of EgoIT, one file each."""
