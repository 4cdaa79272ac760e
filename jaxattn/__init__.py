"""Efficient attention and token selection for JAX."""
