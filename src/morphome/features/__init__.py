"""Encoders and their fingerprints, the encode loop, the feature store. Knows neither genes nor outcomes."""
