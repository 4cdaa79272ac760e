"""Edits of what a trained layer computes."""
