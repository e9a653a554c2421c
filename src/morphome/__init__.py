"""morphome: whole-slide images and molecular tables to survival models and one report."""

__version__ = "0.1.0"
