"""Captions and pictures in."""
