"""The two passes over memory: measure (the sums that h needs) and move (x and its slot take in the update)."""
