"""``python -m experiments``: the command line, for torchrun and accelerate launch."""

from experiments.cli import main

main()
