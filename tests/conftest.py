import os

os.environ.pop("CLIPFT_TRACEBACK", None)
os.environ["OMP_NUM_THREADS"] = "1"  # ranks are forked, and a pool of threads does not come along

import torch

torch.set_num_threads(1)
