"""Acceptance that a draft implies: rules, and sums over dense, truncated and sampled joints."""
