"""Lossless acceleration of frozen Hugging Face chat models (Speculative Streaming, arXiv 2402.11131)."""

from .adapter.weights import StreamAdapter
from .base.packed import pack, unpack
from .config import StreamingConfig
from .errors import UsageError
from .generation.model import AcceleratedModel, Stats, accelerate

__all__ = ["AcceleratedModel", "Stats", "StreamAdapter", "StreamingConfig", "UsageError", "accelerate", "pack", "unpack"]
