"""One-dimensional sparse attention."""
