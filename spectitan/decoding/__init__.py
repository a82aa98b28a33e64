"""Decoding: plain and speculative generation, and the measurement of acceptance, speed and held-out loss."""
