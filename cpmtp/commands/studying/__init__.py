"""What the command `study` does beside its contexts: time, probes, what is said meanwhile."""
