"""Pretrained models: loading, the adapter to transformers, and what a model is tried on."""

from cpmtp.pretrained.adapter import HuggingFaceLanguageModel
from cpmtp.pretrained.loading import embedded_heads, embedded_models, load_language_model

__all__ = ["HuggingFaceLanguageModel", "embedded_heads", "embedded_models", "load_language_model"]
