"""Long, seeded trials of what must never break; scripts/torture.py runs them all, tests run a few."""
