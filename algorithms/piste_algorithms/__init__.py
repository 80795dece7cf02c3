"""Algorithms of gradient descent, usable alone: torch, numpy and numba, never Ray, MLflow or piste."""
