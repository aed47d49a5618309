"""Encoders with CLIP text models."""
