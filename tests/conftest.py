"""One thread per test process: parallel workers would otherwise fight for the cores."""

import torch

torch.set_num_threads(1)
