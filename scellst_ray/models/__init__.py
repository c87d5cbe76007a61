"""Networks, in plain torch: they know nothing about slides, tables or clusters."""
