"""The model that a user holds, the decode loop, the rule of acceptance, and how exact it is here.

Called by users (`accelerate`, `AcceleratedModel.generate`), `evaluation` and the command line. Takes and returns what HF's `generate` does:
token ids `[batch, length]`.
"""
