"""What the author of a module declares of its forward: which sizes vary, and which are the same."""
