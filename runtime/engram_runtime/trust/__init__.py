"""Whose bundles and machine code run here: what the operator asks for, what this user's records and keys say."""
