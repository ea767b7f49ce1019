"""The cost of an experiment before it runs: ``stages`` of training, ``benchmarks`` of evaluation."""
