"""The gene-expression head, trained by multiple-instance learning."""
