"""Algorithms of gradient descent, usable alone: torch and numpy, never Ray, MLflow or piste."""
