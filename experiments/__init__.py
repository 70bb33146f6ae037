"""Experiments: one file per question. Run `python -m experiments.NAME --help` in a clone of the repository."""
