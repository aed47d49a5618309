"""Stored images with captions: folders, tar files, and the public LongAlign captions."""
