"""The small world that ships with the package: scenes, captions, oracle, weights."""
