"""Fold data, losses, the one trainer and the linear baselines."""
