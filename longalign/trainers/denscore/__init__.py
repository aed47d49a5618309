"""The trainer `denscore`: a preference model of long texts."""
