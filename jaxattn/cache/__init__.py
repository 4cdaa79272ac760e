"""Cache policies: which keys exist while decoding."""
