"""Long, seeded trials of what must hold; tests run a few of each, `scripts/torture.py` all."""
