"""Long, seeded trials: the tests run them with a small count, `scripts/torture.py` with the full one."""
