"""Encoders of RNA: bulk expression in, one vector per patient out. Knows neither pixels nor outcomes."""
