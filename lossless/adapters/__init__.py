"""Trained adapters that the package brings, a folder for each base."""
