"""Ways to send the reward's gradient back through sampling: the kind ``schedules``."""
