"""Published weights: which there are, fetching and checking them."""
