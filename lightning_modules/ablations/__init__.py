"""Ablations: a plan of runs over seeds, carried out and resumed, and what they show as tables and figures."""
