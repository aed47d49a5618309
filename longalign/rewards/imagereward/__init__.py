"""The reward `imagereward`."""
