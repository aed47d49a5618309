"""The command line ``longalign``: a module for each command, and modules that several commands share."""
