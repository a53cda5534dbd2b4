"""Measurements: benchmarks, certificates, forecasts, memory, and parity between training and decoding.

Called by the command line. Each gives a dictionary for JSON; tables and pictures are made of those.
"""
