"""Preference data: pairs of images of one prompt."""
