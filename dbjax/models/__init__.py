"""Plain Flax (Linen) networks. They know nothing of blocks, noise or training."""
