"""Import of nuclei that other tools have found."""
