"""Serving recommendations: returning users, files of users, and HTTP."""
