"""Megatron's distributed checkpoints (torch_dist): where they lie, what they hold, their bytes, and writing them."""
