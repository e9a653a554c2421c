"""Metrics, intervals and risk groups. Knows no torch."""
