"""Experiments: one file per question, run as `python -m experiments.<name> --help`. They need a clone."""
