"""Scores: distances between sets of images in some features, and figures of texts."""
