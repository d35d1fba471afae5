"""Text embeddings on disk, so that the text encoders need not be in memory when they are used."""

from g2rpo.data.embeddings.cache import CacheKey, EmbeddingCache, Rows, prompt_key
from g2rpo.data.embeddings.fill import FillSettings, fill

__all__ = [
    "CacheKey",
    "EmbeddingCache",
    "FillSettings",
    "Rows",
    "fill",
    "prompt_key",
]
