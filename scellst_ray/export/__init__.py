"""Tables in the formats other tools open."""
