"""Patients, slides and end points: who is in, who is out, and why. Knows neither pixels nor torch."""
