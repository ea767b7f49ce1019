"""EgoBench: eight egocentric benchmarks from their official files."""
