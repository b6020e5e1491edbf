"""Keys, factors, records and the store that keeps artifacts under them."""
