"""What decoding will earn, before it is run."""
