"""Lossless acceleration of frozen Hugging Face chat models (Speculative Streaming, arXiv 2402.11131).

What is imported from here is public: `accelerate` attaches an adapter to a model and gives an `AcceleratedModel`; `pack` and `unpack`
change the layout of a model's weights in place; `AdapterConfig` is the shape of an adapter (`StreamAdapter`) and `DraftConfig` how
trees are drafted with it; bad input raises `UsageError`.
"""

from .adapter.config import AdapterConfig, DraftConfig
from .adapter.weights import StreamAdapter
from .base.packed import pack, unpack
from .errors import UsageError
from .generation.model import AcceleratedModel, accelerate

__all__ = ["AcceleratedModel", "AdapterConfig", "DraftConfig", "StreamAdapter", "UsageError", "accelerate", "pack", "unpack"]
