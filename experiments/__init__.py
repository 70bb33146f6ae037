"""Experiments: one file per question."""
