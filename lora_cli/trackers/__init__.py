"""Where else the figures of a run can go, one file each; every one is a `tracker.Tracker`."""
