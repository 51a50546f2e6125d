"""Many requests on one loaded bundle: a queue, texts that grow together, and what each is told of its own."""
