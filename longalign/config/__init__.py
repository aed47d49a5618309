"""The config of a run: reading, checking, overriding and describing it; no torch here."""
