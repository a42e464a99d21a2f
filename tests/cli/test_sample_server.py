"""`accord sample-server` in a process of its own, as a trainer meets it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

from accord.models.load import load_policy
from accord.models.tiny import save_tiny
from accord.sampling.connection import HTTPConfig
from accord.sampling.http import connect
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig


def test_it_says_where_it_listens_serves_and_ends(tmp_path):
    model = str(save_tiny(tmp_path / "model"))
    command = [sys.executable, "-m", "accord", "sample-server", "--model", model, "--port", "0"]
    with subprocess.Popen([*command, "--precision", "float32"], stderr=subprocess.PIPE, text=True) as server:
        told = server.stderr.readline()
        url = re.search(r"is served at (http://127\.0\.0\.1:\d+) ", told)[1]
        requests, config = [Request("p", (30, 40), seed=1)], SamplingConfig(max_new_tokens=5)
        completions = connect(HTTPConfig(url=url)).sample(requests, config)
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130
    assert completions == LocalSampler(load_policy(model), "float32").sample(requests, config)
