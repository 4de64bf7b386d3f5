"""The files of a run: written whole, listed, checked, read within bounds."""
