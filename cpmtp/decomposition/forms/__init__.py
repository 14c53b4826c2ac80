"""Fits of drafts that are more than a mixture of products: Markov forms and hidden Markov ones."""
