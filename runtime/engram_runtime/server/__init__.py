"""The HTTP server: routes, limits, keys, metrics and the page."""
