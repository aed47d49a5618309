"""The trainer `lcm`: consistency distillation."""
