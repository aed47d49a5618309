"""The backbone `flux2`: FLUX.2-dev and FLUX.2-klein."""
