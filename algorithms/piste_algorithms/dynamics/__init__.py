"""How gradient descent moves: what the curvature of a loss and the step size make of it."""

from piste_algorithms.dynamics.sharpness import sharpness

__all__ = ["sharpness"]
