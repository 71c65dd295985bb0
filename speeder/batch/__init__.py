"""Whole files and catalogues in parts: encoded, ranked and recommended for, here or by the workers of a Ray cluster."""
