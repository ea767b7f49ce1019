"""Instruction sources of EgoIT, one file each."""
