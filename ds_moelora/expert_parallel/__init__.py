"""One layer's experts over several processes: shards, their exchange, and what DeepSpeed must be told."""
