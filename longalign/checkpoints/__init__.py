"""Reading and writing weights: checkpoints, the authors' files, exports and model cards."""
