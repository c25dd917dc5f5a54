"""One file per method. A new one needs no other change: ``solvers`` and the catalogue find it
here."""
