"""The metric `vqa`: yes/no questions about what a prompt describes, answered by a vision-language model."""
