"""Hugging Face folders in and out: Llama, Qwen2, Qwen3 and Qwen3-MoE, to and from Megatron distributed checkpoints."""
