"""Frozen encoders: texts, pictures and interactions to feature matrices of an `ItemCatalogue`."""
