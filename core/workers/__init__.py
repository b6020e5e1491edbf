"""Processes that compile units beside each other."""
