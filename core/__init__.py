"""vllmc's library: resolve, capture, split, plan, key, obtain, link."""
