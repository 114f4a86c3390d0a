"""Training one model on megatron.core, on GPUs and on CPUs; model building and weight loading shared with evaluation."""
