"""Rows from files and hubs, templates, masks, and what is computed from answers."""
