"""Ray Data pipelines, each named after the table it produces."""
