"""One HTML page for a run: everything in it, nothing fetched."""
