"""What an export of a checkpoint would write, from its config and headers alone, without torch."""
