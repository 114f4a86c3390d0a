"""Scores of a model: validation loss per domain in bits per byte, over fixed token windows."""
