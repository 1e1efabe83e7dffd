"""Benchmarks: `python -m benchmarks.bench_NAME`; benchmarks/README.md has the results. Nothing else imports them."""
