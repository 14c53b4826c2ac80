"""Training of base models and heads."""
