"""What may keep bundles from running well here: small checks of the machine, the installation and a bundle."""
