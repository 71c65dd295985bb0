"""Evaluation: protocols, metrics, bootstrap intervals, slices, tables and leak checks."""
