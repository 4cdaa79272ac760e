"""Attention with another normaliser, gate or layout."""
