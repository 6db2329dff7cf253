"""Defenses, one file each: `training` from a poisoned set, `repair` from a backdoored model; `parts` they share.

A new one also gets a row in `bdbench.registry`.
"""
