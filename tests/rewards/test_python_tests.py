"""What a program may do in `python_tests`, and what becomes of one that does more."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from accord.data.formats import read_row
from accord.rewards import REWARDS, Failed, confine
from accord.rewards.python_tests import PythonTestsConfig, code_of
from accord.types import Prompt, Source

TESTS = "assert double(1) == 2\nassert double(2) == 4"


@pytest.fixture(scope="module")
def judge(completion):
    """`judge(program, tests, **settings)`: the reward of one program; a failure as its reason."""

    def one(program, tests=TESTS, **settings):
        config = PythonTestsConfig.build({"name": "python_tests", "cpu_seconds": 1, **settings})
        function = REWARDS["python_tests"].build(config, None)
        (outcome,) = function([Prompt("p", "Write double.", answer=tests)], [completion(program)])
        return outcome.reason if isinstance(outcome, Failed) else outcome

    return one


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Like this:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```\nand\n```py\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\n", "x = 1\n"),
        ("x = 1", "x = 1"),
        ("```python\ntext = '```'\n```", "text = '```'\n"),
    ],
)
def test_the_code_is_the_last_block(text, code):
    assert code_of(text) == code


@pytest.mark.parametrize(
    ("program", "share"),
    [
        ("def double(x):\n    return 2 * x", 1),
        ("```python\ndef double(x):\n    return 2 * x\n```", 1),
        ("def double(x):\n    return 2", 0.5),
        ("def double(x):\n    return x", 0),
        ("def double(x:", 0),
        ("", 0),
        ("def double(x):\n    if x == 2: raise SystemExit\n    return 2 * x", 0.5),
        ("def double(x):\n    return 2 * x\nraise ValueError", 1),
        ("def double(x):\n    return 2 * x\nif __name__ == '__main__':\n    print(input())", 1),
        ("import os\ndef double(x):\n    if x == 2: os._exit(0)\n    return 2 * x", 0.5),
    ],
)
def test_the_reward_is_the_share_of_tests_that_pass(judge, program, share):
    assert judge(program) == share
    assert judge(program, partial=False) == (share == 1)


def test_imports_definitions_and_assignments_are_no_tests(judge):
    tests = "import math\ndef check(f):\n    assert f(1) == math.ceil(1.5)\n    assert f(3) == 6\nn = 2\ncheck(double)"
    assert judge("def double(x): return 2 * x", tests) == 1
    assert judge("def double(x): return 2", tests) == 0
    assert sum(is_test for _, is_test in confine.statements(tests)) == 1


HEAD = "import math\n\ndef half(x):\n    return x / 2\n\ndef root(x: float) -> float:\n    'root(8) == 2'\n"
CHECK = "METADATA = {}\n\ndef check(candidate):\n    assert candidate(8) == 2\n    assert candidate(2) == 1\n"
RESTATED = "def root(x):\n    return math.sqrt(half(x))"


@pytest.mark.parametrize(
    ("completion_text", "worth"),
    [
        ("    return math.sqrt(half(x))\n", 1),
        ("    return half(x)\n", 0),
        (f"{RESTATED}\n", 1),
        (f"Of course:\n```python\n{RESTATED}\n```\n", 1),
        ("```python\nfrom math import sqrt\ndef root(x):\n    return sqrt(x / 2)\n```", 1),
        ("    return math.sqrt(half(x)\n", 0),
        ("", 0),
    ],
)
def test_a_completion_goes_on_with_a_prompt_that_is_python(completion, completion_text, worth):
    """Columns of HumanEval: the head of a function, a function `check` of it, its name."""
    row = {"task_id": "x/0", "prompt": HEAD, "entry_point": "root", "test": CHECK, "canonical_solution": "…"}
    (prompt,) = read_row(row, Source("tasks.jsonl", 1))
    function = REWARDS["python_tests"].build(PythonTestsConfig(name="python_tests"), None)
    assert function([prompt], [completion(completion_text)]) == [worth]


def test_a_prompt_in_words_is_no_part_of_the_program(completion):
    prompt = Prompt("p", "Write double.", answer=TESTS)
    function = REWARDS["python_tests"].build(PythonTestsConfig(name="python_tests"), None)
    assert function([prompt], [completion("def double(x):\n    return 2 * x")]) == [1]


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        (None, "the prompt has no tests"),
        ("import math", "the prompt's tests test nothing"),
        ("assert (", "the tests are not Python"),
    ],
)
def test_what_is_wrong_with_the_prompt_is_a_failure(judge, tests, reason):
    assert judge("x = 1", tests).startswith(reason)


GREEDY = {
    "an endless loop": "while True: pass",
    "a caught signal": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "memory": "hog = []\nwhile True: hog.append(bytearray(1 << 24))",
    "a fork bomb": "import os\nwhile True:\n    os.fork()",
    "a stubborn fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except BaseException: pass",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "a large file": "file = open('large', 'wb')\nwhile True: file.write(bytes(1 << 20))",
}


@pytest.mark.parametrize("program", GREEDY.values(), ids=GREEDY)
def test_a_greedy_program_is_ended_and_the_tests_that_follow_fail(judge, program):
    before = time.monotonic()
    reward = judge(f"def double(x):\n    if x == 1: return 2\n    exec({program!r})", timeout=60.0)
    assert reward == 0.5
    assert time.monotonic() - before < 30
    assert not _running("confine.py")


def test_a_program_that_waits_is_stopped_by_the_clock_and_has_no_reward(judge):
    assert judge("import time\ntime.sleep(60)", timeout=0.5) == "timeout"
    assert not _running("confine.py")


@pytest.fixture
def server():
    """A server on this machine that counts its visitors."""
    visits = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            visits.append(self.path)
            self.send_response(200)
            self.end_headers()

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    yield httpd.server_port, visits
    httpd.shutdown()
    httpd.server_close()


def test_there_is_no_network(judge, server):
    port, visits = server
    program = (
        f"import urllib.request\ndef double(x):\n    urllib.request.urlopen('http://127.0.0.1:{port}')\n    return 2*x"
    )
    assert judge(program) == 0
    assert visits == []


OUTSIDE = {
    "write": "open({path!r}, 'w')",
    "append": "open({path!r}, 'a').write('x')",
    "truncate": "os.truncate({path!r}, 0)",
    "low level": "os.open({path!r}, os.O_WRONLY | os.O_CREAT)",
    "remove": "os.remove({path!r})",
    "rename": "os.rename({path!r}, 'mine')",
    "replace": "open('mine', 'w').close() or os.replace('mine', {path!r})",
    "link": "os.symlink({path!r}, 'link') or open('link', 'w')",
    "mode": "os.chmod({path!r}, 0)",
    "new file": "open({path!r} + '.new', 'w')",
    "new directory": "os.mkdir({path!r} + '.d')",
    "another program": "os.system('echo x > ' + {path!r})",
    "a subprocess": "__import__('subprocess').run(['touch', {path!r} + '.new'], check=True)",
    "ctypes": "__import__('ctypes').CDLL(None).unlink({path!r}.encode()) and 1/0",
    "kill": "os.kill(os.getppid(), 0)",
}


@pytest.mark.parametrize("action", OUTSIDE.values(), ids=OUTSIDE)
def test_nothing_outside_is_touched(judge, tmp_path, action):
    path = tmp_path / "precious.txt"
    path.write_text("precious")
    program = f"import os\ndef double(x):\n    {action.format(path=str(path))}\n    return 2 * x"
    assert judge(program) == 0
    assert path.read_text() == "precious"
    assert [each.name for each in tmp_path.iterdir()] == ["precious.txt"]


def test_files_in_the_working_directory_are_allowed_and_removed(judge, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = "def double(x):\n    open('note', 'w').write('2')\n    return int(open('note').read()) * x"
    assert judge(program) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_empty_and_only_the_standard_library_is_there(judge, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    assert judge("import os\ndef double(x): return 2 * x if 'SECRET_KEY' not in os.environ else 0") == 1
    assert judge("import numpy\ndef double(x): return 2 * x") == 0


def test_what_a_program_prints_is_no_result(judge):
    assert judge("import os\nfor k in range(9): os.write(1, b'token 1\\n')\ndef double(x): return 0") == 0


def test_a_batch_keeps_its_order(completion):
    function = REWARDS["python_tests"].build(PythonTestsConfig(name="python_tests", concurrency=3), None)
    prompts = [Prompt("p", "Write double.", answer=f"assert double({k}) == {2 * k}") for k in range(5)]
    programs = [
        f"def double(x): return 2 * x if x != {k} else None" if k % 2 else "double = lambda x: 2 * x" for k in range(5)
    ]
    assert function(prompts, [completion(program) for program in programs]) == [1, 0, 1, 0, 1]


KERNEL = {
    "isolate_network": ("confine.isolate_network()", "socket.create_connection(('127.0.0.1', {port}), 2)"),
    "deny_files": ("confine.deny_files(os.getcwd())", "open({path!r}, 'w')"),
    "deny_system_calls": ("confine.deny_system_calls()", "os.fork()"),
    "deny_system_calls of sockets": ("confine.deny_system_calls()", "socket.socket()"),
    "deny_system_calls of signals": ("confine.deny_system_calls()", "os.kill(os.getppid(), 0)"),
    "audit": ("sys.addaudithook(confine.audit(os.getcwd())) or True", "open({path!r}, 'w')"),
    "audit of sockets": ("sys.addaudithook(confine.audit(os.getcwd())) or True", "socket.socket()"),
}


@pytest.mark.parametrize(("layer", "action"), KERNEL.values(), ids=KERNEL)
def test_each_layer_holds_alone(tmp_path, server, layer, action):
    script = (
        "import os, socket, sys\n"
        f"sys.path.insert(0, {os.path.dirname(confine.__file__)!r})\n"
        "import confine\n"
        f"if not ({layer}): sys.exit(3)\n"
        f"try:\n    {action.format(path=str(tmp_path / 'new'), port=server[0])}\n"
        "except OSError: sys.exit(0)\n"
        "sys.exit(1)"
    )
    inside = tmp_path / "inside"
    inside.mkdir()
    ran = subprocess.run([sys.executable, "-I", "-S", "-B", "-c", script], cwd=inside, check=False)
    if ran.returncode == 3:
        pytest.skip("this kernel refuses that layer")
    assert ran.returncode == 0
    assert server[1] == []
    assert not (tmp_path / "new").exists()


def _running(name: str) -> list[str]:
    """The command lines of processes of this one's that run the file `name`."""
    listing = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True)
    return [line for line in listing.stdout.splitlines() if name in line]
