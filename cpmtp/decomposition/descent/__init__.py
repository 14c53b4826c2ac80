"""How fits go down: quasi-Newton steps, extrapolated sweeps, gradients of a mixture's logits."""
