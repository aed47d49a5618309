"""The bundled synthetic scenes: rendering, captions, an exact fact oracle, and the `mini` weights."""
