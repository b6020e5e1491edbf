"""Compiling one unit (a piece for a range of token counts) to a self-contained artifact."""
