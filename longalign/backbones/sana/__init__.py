"""The backbone `sana`: Sana and Sana-1.5."""
