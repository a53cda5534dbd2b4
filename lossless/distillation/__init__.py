"""The base's own answers to prompts, collected to learn from.

Called by `lossless distill`; `training` reads what it has stored. Only the base runs here.
"""
