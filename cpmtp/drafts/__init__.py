"""What may be proposed to a target, and how far it is from the exact joint."""
