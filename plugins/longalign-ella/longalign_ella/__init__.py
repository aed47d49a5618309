"""ELLA as an encoder of longalign."""
