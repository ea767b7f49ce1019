"""Reading and writing files: JSON Lines, annotation tables, worker processes, atomic replacement."""
