"""Rewards from transformers' ``CLIPModel``: CLIP, PickScore and Denscore, with different weights."""
