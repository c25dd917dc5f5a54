"""One torch thread per test process: two workers on two cores must not compete for them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the commands that tests start

import torch  # noqa: E402  (after the variable that it reads)

torch.set_num_threads(1)
