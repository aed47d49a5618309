"""The backbone `flux`: FLUX.1."""
