"""Frozen encoders: texts, pictures and interactions to feature matrices for an `ItemCatalogue`."""
