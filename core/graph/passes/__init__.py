"""Passes: rewrites of graphs that keep what they compute and change what it costs."""
