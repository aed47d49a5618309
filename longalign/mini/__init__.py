"""The small world that ships with the package: scenes, captions, an exact fact oracle, and small weights."""
