"""What host tables are read for, and what their rows do."""
