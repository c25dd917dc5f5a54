"""One torch thread per test process: two workers on two cores must not compete for them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it; commands inherit it

import torch

torch.set_num_threads(1)
