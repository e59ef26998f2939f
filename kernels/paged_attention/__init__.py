"""Attention of an answer over chosen pages of its memory."""
