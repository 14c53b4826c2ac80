"""Learned heads: the module, its losses, its evaluation."""
