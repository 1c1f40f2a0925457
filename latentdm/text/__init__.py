"""Captions → prompt embeddings, as the pipelines make them."""

from latentdm.text.encoder import TextEncoder
from latentdm.text.tokens import Tokenizer

__all__ = ["TextEncoder", "Tokenizer"]
