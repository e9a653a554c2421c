"""One file per model; tensors in, tensors out. Knows neither files nor pandas nor Snakemake."""
