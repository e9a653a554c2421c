"""Molecular tables and gene groups. Knows neither pixels nor outcomes."""
