"""What ``state_dict`` writes, and what ``load_state_dict`` asks of it before it loads anything."""
