"""Helper code of single chapters, too long for a cell."""
