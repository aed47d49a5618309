"""The trainers `reward` and `lcm-reward`: reward fine-tuning."""
