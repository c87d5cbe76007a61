"""Published weights: the catalogue, downloads and checks."""
