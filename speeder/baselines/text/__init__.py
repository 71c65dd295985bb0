"""Baselines that read items as text, on the backbone that Speeder wraps."""
