"""Threads cost more than they bring where the models are tiny, most of all when tests run on every core."""

import torch

torch.set_num_threads(1)
