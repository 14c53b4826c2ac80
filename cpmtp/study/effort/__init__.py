"""What a study takes: a trial on this machine, and what fits into a given time."""
