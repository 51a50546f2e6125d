"""Names of signatures and of what they are of."""

SIGNATURE_SUFFIX = ".sig"
MANIFEST, LIBRARY = "manifest", "library"
