"""Files of runs: their places, weights, caches and locks, written atomically."""
