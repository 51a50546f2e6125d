"""Add Engram memory and a draft head to a language model that is already trained, its weights left as they are."""
