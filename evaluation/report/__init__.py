"""What a run found, for a person: a page, a table, a picture."""
