from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version

import pytest

from accord.cli.doctor import GIB, Check, disk_check, hub_check, memory_check, package_checks


def test_a_healthy_machine_is_told_so():
    """The environment that runs these tests has everything; the hub is switched off by the environment."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "accord", "doctor"]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    lines = {
        line.split()[1]: line.split()[0] for line in ran.stdout.splitlines() if line.split()[:1] in [["OK"], ["note"]]
    }
    expected = {"python", "torch", "transformers", "device", "precision", "memory", "allocator", "starter", "hub"}
    assert expected <= set(lines)
    assert lines["hub"] == "OK"
    # The disk is the machine's own affair; everything else must be there.
    missing = [line for line in ran.stdout.splitlines() if line.startswith("missing") and line.split()[1] != "disk"]
    assert not missing
    assert ran.returncode == (1 if "disk" not in lines else 0)


def test_packages_are_compared_with_what_is_needed_and_with_what_was_tested():
    installed = version("rich")
    required = ["no-such-package-here>=2", "rich>=99", "rich>=1", "rich>=1", 'rich>=99; extra == "dev"']
    pins = [{}, {"rich": "0.0.1"}, {"rich": installed}]
    absent, old, fine = package_checks(required[:3], pins[0])
    assert absent[:3] == ("no-such-package-here", "missing", "not installed; needs >=2")
    assert old[:3] == ("rich", "missing", f"{installed}; needs >=99")
    assert absent.fix
    assert old.fix
    assert fine == Check("rich", "OK", installed)
    (other,) = package_checks(["rich>=1"], pins[1])
    assert other[:3] == ("rich", "note", f"{installed}; tested with 0.0.1")
    assert list(package_checks(["rich>=1"], pins[2])) == [Check("rich", "OK", installed)]
    assert not list(package_checks(required[4:], {})), "development tools are not needed"


def test_a_build_of_the_pinned_version_is_that_version():
    """torch 2.13.0+cpu satisfies the pin 2.13.0."""
    exact, _, _ = version("torch").partition("+")
    (check,) = package_checks(["torch"], {"torch": exact})
    assert check.state == "OK"


@pytest.mark.parametrize(("free", "state"), [(6 * GIB, "OK"), (6 * GIB - 1, "note")])
def test_memory(free, state):
    assert memory_check(free, 8 * GIB).state == state


def test_disk(tmp_path):
    assert disk_check(tmp_path, needed=1).state == "OK"
    full = disk_check(tmp_path, needed=1 << 60)
    assert full.state == "missing"
    assert "--out" in full.fix


@pytest.fixture
def hub(request) -> Iterator[str]:
    """A hub of our own that answers every request with one status."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("hub", [200, 404, 500], indirect=True)
def test_a_hub_that_answers_is_there(hub):
    assert hub_check(hub) == Check("hub", "OK", f"{hub} answers")


def test_a_hub_that_is_not_there_is_a_note():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        check = hub_check(f"http://127.0.0.1:{free.getsockname()[1]}")
    assert check.state == "note"
    assert "refused" in check.detail
    assert "HF_HUB_OFFLINE=1" in check.fix


def test_an_address_that_is_none_is_a_note():
    assert hub_check("hub.example").state == "note"


def test_a_hub_that_never_answers_is_given_up_in_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        check = hub_check(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)
    assert check.state == "note"
    assert "0.2 s" in check.detail
