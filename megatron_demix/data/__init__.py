"""Data: text to Megatron's indexed format (prepare), a mixture and a token budget to the final run's data set (blend)."""
