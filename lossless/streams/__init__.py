"""Stream rows inside the frozen model's layers: passes, attention, masks, and the cache.

Called by `generation` (verify, speculate) and `training` (the same passes along stored answers). A pass takes `[batch, rows]` token ids
and gives `[batch, rows, vocab]` logits and `[batch, nodes, num_streams, dim]` streams.
"""
