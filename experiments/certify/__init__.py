"""Certificates: whether a solver does what it declares, measured on problems with known answers."""
