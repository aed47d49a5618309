"""Generating images: the sampling loop, conditioning for diffusers pipelines, unmodified pipelines as baselines."""
