"""Rewards from transformers' ``CLIPModel``: CLIP, PickScore and Denscore, which differ only in their weights."""
