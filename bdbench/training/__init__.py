"""How networks are trained and run: the one loop, its data path, augmentation, checkpoints and devices."""
