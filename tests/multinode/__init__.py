"""Two hosts on one machine, and runs on both (`make test-multinode`)."""
