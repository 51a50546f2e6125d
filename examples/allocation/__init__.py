"""How to divide a fixed number of parameters between experts and an n-gram table, at toy scale."""
