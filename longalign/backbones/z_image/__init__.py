"""The backbone `z-image`: Z-Image and Z-Image-Turbo."""
