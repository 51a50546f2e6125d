"""Requests read from a file and answered into another, in OpenAI's batch format."""
