"""Measurements of our own speed beside the usual ways."""
