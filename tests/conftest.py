"""One torch thread per test process: two workers on two cores must not compete for them.

And Ctrl-C as in a terminal: a shell that starts the tests in the background has them, and the
commands that they start, ignore it.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it; commands inherit it

import torch

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
