"""What happened, why, and how to avoid it: recompiles, and what other systems recorded."""
