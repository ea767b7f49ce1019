"""EgoBench: evaluate a model on eight benchmarks of egocentric video, or on one of your own."""
