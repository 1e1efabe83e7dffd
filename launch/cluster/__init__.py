"""Many hosts: checks, remote start, and the watchdog between processes."""
