"""Families of generators: how each learns and draws."""
