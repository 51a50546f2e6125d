"""Host tables: rows fetched by id, from memory or from files."""
