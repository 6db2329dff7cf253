"""Defenses that repair a model that may be backdoored, with a few trusted images."""
