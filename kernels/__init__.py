"""Kernels of the streaming memory: each folder holds one operation, its naive torch twin and its fast version."""
