"""Merging components: the plan of bytes, the methods, to disk (engine) and into a live model (proxies)."""
