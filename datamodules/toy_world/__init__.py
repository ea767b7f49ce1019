"""A small world of table-top actions, filmed by glasses and tripod cameras: the default dataset."""
