"""Model, trainer and report of one run."""
