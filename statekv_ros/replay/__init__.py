"""Bags: make them from videos and images, read them, play them into the node."""
