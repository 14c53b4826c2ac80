"""A study: contexts, cells, workers, storage."""
