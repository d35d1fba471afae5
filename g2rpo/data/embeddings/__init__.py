"""Text embeddings on disk, so that the text encoders need not be in memory when they are used."""

from g2rpo.data.embeddings.cache import CacheKey, EmbeddingCache, Rows, prompt_key
from g2rpo.data.embeddings.fill import WHOLE, FillSettings, Part, fill

__all__ = [
    "WHOLE",
    "CacheKey",
    "EmbeddingCache",
    "FillSettings",
    "Part",
    "Rows",
    "fill",
    "prompt_key",
]
