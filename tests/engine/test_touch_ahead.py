"""Memory that is touched ahead stands ready in the heap."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

_SCRIPT = """
import json, resource, sys, threading
from pathlib import Path
import torch
from accord.engine.memory import touch_ahead
touch_ahead(Path(sys.argv[1]))
[thread.join() for thread in threading.enumerate() if thread.name == "touch memory"]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(64 << 20, dtype=torch.uint8).add_(1)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is told to keep memory")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is touched ahead")
def test_a_block_of_touched_memory_has_no_page_faults(tmp_path: Path) -> None:
    """5 million weights are promised 18 bytes each, 90 MB: room for a block of 64 MB, which is 16,384 pages."""
    save_file({"weight": torch.zeros(5_000_000)}, tmp_path / "model.safetensors")
    assert _faults(tmp_path) < 2_000
    save_file({"weight": torch.zeros(5)}, tmp_path / "model.safetensors")
    assert _faults(tmp_path) > 14_000


def test_what_is_no_model_is_left_to_the_loader(tmp_path: Path) -> None:
    """A broken file is an error later, with a message of its own; here nothing happens."""
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    assert _faults(tmp_path) > 0
    assert _faults(tmp_path / "missing") > 0


def _faults(directory: Path) -> int:
    """Page faults of a 64 MB block after memory for this model was touched."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT, str(directory)], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))
