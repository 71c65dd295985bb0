"""Recommendations for users: kept sessions, whole files, and HTTP."""
