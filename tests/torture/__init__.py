"""What a run must survive, tried at every place or by chance with a seed; scripts/torture.py runs all of it."""
