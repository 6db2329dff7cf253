"""Classifiers: normalise, features, head."""
