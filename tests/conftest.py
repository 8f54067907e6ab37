import torch

torch.backends.cudnn.allow_tf32 = False  # as exact on a GPU as on the CPU
torch.set_num_threads(1)  # for tensors of this size, threads cost more than they give
