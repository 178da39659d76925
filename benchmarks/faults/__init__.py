"""The fault table: every fault injected for real, and what driftrec does about it."""
