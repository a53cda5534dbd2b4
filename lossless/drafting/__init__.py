"""From streams to a draft tree: the transition head's levels, n-grams, sampling noise, and how large a tree pays.

Called by `generation` once a step and by `training` when it simulates acceptance. Takes streams `[batch, num_streams, dim]`, gives a
`DraftTree` for each text.
"""
