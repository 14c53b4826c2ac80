"""Which rank: criteria, selection, comparison of studies."""
