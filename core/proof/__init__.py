"""Proving by compilation whether two configurations differ in what matters: code, and numbers."""
