"""Resolving a MODEL argument and building the model with fake or real weights."""
