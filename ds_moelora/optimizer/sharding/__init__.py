"""Where shards lie and how ranks exchange them. With `plugin.py`, the only code that knows DeepSpeed."""
