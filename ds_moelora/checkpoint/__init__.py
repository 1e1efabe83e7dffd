"""Training state that names no topology: writing, reading, checking."""
