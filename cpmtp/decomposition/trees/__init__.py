"""Fits to trees of prefixes: over the ids that occur, every method, anchored too."""
