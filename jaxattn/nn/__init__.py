"""Flax NNX layers around the pure functions; no method names here."""
