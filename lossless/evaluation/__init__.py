"""Measurements: how fast, how exact, and how fast it can become."""
