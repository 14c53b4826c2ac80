"""What is read first: the answer in four lines, on a page and on a terminal."""
