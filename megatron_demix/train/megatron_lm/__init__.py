"""Stock Megatron-LM as the trainer: its command for a run, and what its process says while it goes on."""
