"""What is trained: the weights of the streams, their shape, saving, the hub, and whether they fit a base.

Called by `streams` (a pass applies them), `training` (they learn) and `accelerate`. Tensors are `[batch, rows, dim]`.
"""
