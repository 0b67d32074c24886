"""Facts -> one page for people and one JSON for programs."""
