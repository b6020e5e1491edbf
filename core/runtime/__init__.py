"""Linking artifacts to a program, and the engine that generates with it."""
