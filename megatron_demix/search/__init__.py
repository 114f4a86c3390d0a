"""Which mixture wins: sample mixtures, fit their scores, choose a feasible one, check that proxies rank like training."""
