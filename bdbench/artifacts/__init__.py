"""Sealed folders on disk: datasets, models and evaluations."""
