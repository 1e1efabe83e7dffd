"""What `benchmarks/bench_language_model.py` is made of: tasks, one training run, the plan, and the report."""
