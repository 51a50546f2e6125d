"""What a model will take and give on a machine, told from headers and configs alone."""
