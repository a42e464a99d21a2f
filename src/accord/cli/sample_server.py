"""`accord sample-server`: a policy behind HTTP, for rollouts in another process."""

from __future__ import annotations

import sys
from typing import Literal

__all__ = ["sample_server"]


def sample_server(
    *,
    model: str,
    host: str = "127.0.0.1",
    port: int = 8001,
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
) -> None:
    """Serve a model to trainers and evaluations in other processes: token ids in, tokens and log-probabilities out.

    There is no password, and who reaches it can have it load any directory: let only the trainer reach it.

    Parameters
    ----------
    model
        Hub id, directory, or `starter`. With LoRA: the base model that is trained.
    host
        Address to listen on; 0.0.0.0 lets other machines in.
    port
        Port to listen on; 0 takes a free one.
    precision
        That of the training run, so that log-probabilities are those of training.
    """
    from accord.sampling.serve import SampleServer

    server = SampleServer(model, host=host, port=port, precision=precision)
    print(f"{model} is served at {server.url} (Ctrl-C ends).", file=sys.stderr, flush=True)
    server.run()
