"""The embedded default: a tiny model, its data, its settings."""
