"""How an adapter learns from stored answers, and what acceptance that would give.

Called by `lossless train` and `lossless ablate`. Does not import `generation`: what it says of acceptance is held against the decode loop
by `evaluation.parity`.
"""
