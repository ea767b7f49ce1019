"""The training stages of Exo2Ego, one file each, over one shared model."""
