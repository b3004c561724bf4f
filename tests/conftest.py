import torch

torch.set_num_threads(1)  # ranks are forked, and threads of the parent do not come along
