"""Detectors that score the samples of a training set, one file each."""
