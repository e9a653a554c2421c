"""Tables, figures and the one HTML page. Knows nothing of how anything was trained."""
