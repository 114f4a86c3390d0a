"""Cleaning text before it is prepared: what is kept, what is removed, why, and where it lies.

The work is datatrove's, fastText's and KenLM's (extra [data]); here is which of their steps run in which order with which
settings (plan.py), where they run (run.py), and the account of what was removed (account.py).
"""

REVISION = 4
"""Raised where the same settings come to remove other documents, so that no earlier cleaning is taken for the same."""
