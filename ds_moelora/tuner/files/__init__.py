"""Adapter files: saving, reading, export, the model card."""
