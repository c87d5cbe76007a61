"""Networks and their files, in plain torch."""
