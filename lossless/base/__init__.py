"""The frozen model as it is found: loading, the demo model, its structure, what identifies it, and packed weights.

Called by everything above. Knows transformers and torch; nothing here knows of adapters, streams or drafts.
"""
