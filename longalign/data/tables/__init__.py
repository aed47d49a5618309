"""Tables read with the library ``datasets``."""
