"""Opening slides, microns per pixel, tissue, quality, tile grid. Knows neither encoders nor patients."""
