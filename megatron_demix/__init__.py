"""DeMix for Megatron: train one component per domain, merge them into proxies, search the mixture, build the blend."""

__version__ = "0.1.0"
