"""What lash_store costs, beside what a user would take instead: ``python -m benchmarks``."""
