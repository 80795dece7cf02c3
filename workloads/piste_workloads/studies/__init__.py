"""Studies: one file a paper, what it claims and how that is measured here."""
