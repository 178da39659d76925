"""Which model is in service: the gate, the decisions, and what they keep from removal."""
