"""Ray Data: from a cohort to its tables, on a cluster."""
