"""Saving, resuming and stopping a run."""
