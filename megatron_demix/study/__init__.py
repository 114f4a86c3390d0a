"""The study file: its sections, and how it is read."""
