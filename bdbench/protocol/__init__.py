"""The rules that make rows comparable: who is poisoned, how a model is judged, what a metric counts."""
