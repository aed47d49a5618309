"""Selection of the sampling steps that carry the reward's gradient: the kind ``gradient_steps``."""
