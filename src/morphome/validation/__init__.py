"""Evidence on planted data: what each model finds where the truth is known, against stated bounds."""
