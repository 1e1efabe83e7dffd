"""What `benchmarks/bench_convergence.py` is made of: tasks, one training run, the studies, and the report."""
