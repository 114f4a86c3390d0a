"""Scores of models: bits per byte of each domain over fixed token windows, and tasks; of live proxies, or of checkpoints."""
