"""EgoBench: what a model knows about egocentric video, by eight benchmarks."""
