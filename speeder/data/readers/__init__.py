"""Readers of raw data sets, one file a format; each gives a `PreparedData` without features."""
