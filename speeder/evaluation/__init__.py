"""The parts of evaluation: metrics, bootstrap intervals, slices, tables and leak checks."""
