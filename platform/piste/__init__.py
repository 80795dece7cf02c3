"""A platform for experiments on gradient-descent algorithms."""
