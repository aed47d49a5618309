"""The reward `vqascore`."""
