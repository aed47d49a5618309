"""Prompts without images."""
