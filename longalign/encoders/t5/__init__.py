"""Encoders with T5 and its adapter."""
