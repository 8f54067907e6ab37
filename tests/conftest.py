import torch

torch.set_num_threads(1)  # for tensors of this size, threads cost more than they give
