"""Questions about the facts of a prompt, answered by a vision-language model (DSG, DPG-Bench)."""
