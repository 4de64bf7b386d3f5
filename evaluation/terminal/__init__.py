"""What is typed and shown at a terminal: numbers, tables, progress, how a command ends."""
