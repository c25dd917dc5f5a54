"""Ratios, measured in one run and printed: ``python -m benchmarks.overhead`` and its siblings."""
