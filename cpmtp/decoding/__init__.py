"""Lossless self-speculative decoding and what it reports."""
