"""Boards: what each method costs and keeps, measured on models that are trained here."""
