"""How fast is jaxlstm? Run `python -m benchmarks.benchmark --help` from a clone."""
