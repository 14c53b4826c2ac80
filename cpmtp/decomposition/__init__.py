"""Fits of CP distributions to exact joints: one signature, one result, several methods."""
