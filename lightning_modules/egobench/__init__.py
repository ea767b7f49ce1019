"""EgoBench: eight egocentric benchmarks, from the model's answers to a table."""
