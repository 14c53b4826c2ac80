"""Learning curves: families, tasks of known end, shapes, and the choice among them."""
