"""Grids of attacks, defenses and seeds, every cell in a process of its own."""
