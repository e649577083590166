"""Long seeded attacks on the product, each with figures as its result; a test runs a few, scripts/torture.py all."""
