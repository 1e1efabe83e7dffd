"""Fine-tuning scripts around `ds_moelora`. Nothing in the package imports this folder."""
