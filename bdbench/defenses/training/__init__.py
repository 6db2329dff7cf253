"""Defenses that train a model from a set that may be poisoned."""
