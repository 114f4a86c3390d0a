#!/usr/bin/env python3
"""Convert between Hugging Face folders and Megatron distributed checkpoints (torch_dist): Llama, Qwen2, Qwen3, Qwen3-MoE.

  convert_hf.py import HF_DIR --output DIR [--tensor N --pipeline N]
  convert_hf.py export CHECKPOINT --output HF_DIR [--reference HF_DIR]

Import makes a base to train components from; export takes any checkpoint of such a model, merged proxies included.
Elements keep their bits. No GPU is needed, nothing is downloaded, and no code of either side is run.
"""

import sys

from megatron_demix.huggingface.command import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
