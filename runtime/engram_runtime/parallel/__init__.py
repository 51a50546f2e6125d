"""Several continuations of one text: sequences that share its states and are run together."""
