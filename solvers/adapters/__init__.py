"""Other libraries' solvers, one file each: they own their loop and return the same Solution."""
