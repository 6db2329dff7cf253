"""Detectors: methods that say which training samples, inputs or models look backdoored. None knows the truth."""
