"""Detectors: what is where in a picture."""

from models.detection import boxes, focus_detr

__all__ = ["boxes", "focus_detr"]
