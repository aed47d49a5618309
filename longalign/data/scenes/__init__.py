"""The synthetic scenes as captioned images, and as pairs of images with a preference."""
