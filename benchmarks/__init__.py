"""What the claims of the README and the docs are measured with; run from the repository's root."""
