"""What a text reads from host tables, and what is in them: traces, miss-ratio curves, pictures, figures."""
