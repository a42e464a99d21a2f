"""What runs inside the process of `accord.rewards.python_tests`: it gives up what it may do, then runs the tests.

Started by path as ``python -I -S -B confine.py``, so it imports the standard library only. Standard input is JSON
``{before, code, tests, limits, token}``; standard output gets one line ``token index`` for each test that passed. Of
``{code, limits}`` it gets what the code prints.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import json
import os
import platform
import resource
import struct
import sys
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

__all__ = [
    "audit",
    "confine",
    "deny_files",
    "deny_system_calls",
    "die_with_parent",
    "isolate_network",
    "limit",
    "program",
    "run",
    "show",
    "statements",
]


def statements(tests: str) -> list[tuple[ast.stmt, bool]]:
    """The statements of the tests and whether each one is a test: imports, definitions and assignments are none.

    Raises:
        SyntaxError: not Python.
    """
    setup = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    return [(node, not isinstance(node, setup)) for node in ast.parse(tests).body]


def limit(limits: Mapping[str, int]) -> None:
    """Limit CPU seconds, address space, size of files, open files; no further process or thread, no core file."""
    seconds, memory, size = limits["cpu_seconds"], limits["memory_mb"] << 20, limits["file_mb"] << 20
    bounds = [
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, size, size),
        (resource.RLIMIT_NOFILE, 32, 32),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ]
    for which, soft, hard in bounds:
        most = resource.getrlimit(which)[1]
        hard = hard if most == resource.RLIM_INFINITY else min(hard, most)
        with contextlib.suppress(ValueError, OSError):  # a system that has no such limit
            resource.setrlimit(which, (min(soft, hard), hard))


# --- Linux: name spaces, Landlock, seccomp -----------------------------------------------------------------------

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 1, 38, 22, 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# Landlock's rights to change files, by version: write, remove and make; then refer; then truncate.
_WRITE, _CHANGE, _REFER, _TRUNCATE = 1 << 1, sum(1 << bit for bit in range(4, 13)), 1 << 13, 1 << 14

# System calls by number: sockets, processes and other programs, signals, other processes' memory and limits, mounts and
# name spaces, owners and modes of files, io_uring (which would do any of it without a call of its own).
_DENIED = {
    "x86_64": (
        0xC000003E,
        "41 53 56 57 58 59 62 90 91 92 93 94 101 129 155 165 200 234 260 268 272 297 302 308 310 311 321 322 424 425 "
        "434 435 438 452",
    ),
    "aarch64": (
        0xC00000B7,
        "40 41 52 53 54 55 97 117 129 130 131 138 198 199 220 221 240 261 268 270 271 280 281 424 425 434 435 438 452",
    ),
}


def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def isolate_network() -> bool:
    """Enter a user and a network name space of its own, without an interface; False where the kernel refuses."""
    return sys.platform == "linux" and _library().unshare(_NEW_USER | _NEW_NETWORK) == 0


def die_with_parent() -> None:
    """Be killed when the process that started this one is gone."""
    if sys.platform == "linux":
        _library().prctl(_DIE_WITH_PARENT, 9, 0, 0, 0)


def deny_files(directory: str) -> bool:
    """Landlock: nothing outside the directory can be written, made or removed; False where the kernel has none."""
    if sys.platform != "linux":
        return False
    library = _library()
    version = library.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = _WRITE | _CHANGE | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    rules = library.syscall(_LANDLOCK_CREATE, struct.pack("Q", rights), ctypes.c_size_t(8), 0)
    for path, granted in ((directory, rights), (os.devnull, rights & (_WRITE | _TRUNCATE))):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        library.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", granted, descriptor), 0)
        os.close(descriptor)
    library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    done: bool = library.syscall(_LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return done


def deny_system_calls() -> bool:
    """Seccomp: no socket, no process, no other program, no signal to another; False where the kernel refuses."""
    if sys.platform != "linux" or platform.machine() not in _DENIED or struct.calcsize("P") != 8:
        return False
    architecture, numbers = _DENIED[platform.machine()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    refused, allowed, killed = 0x00050000 | 1, 0x7FFF0000, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, killed), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, killed)]  # x32's numbers for the same calls
    for number in map(int, numbers.split()):
        program += [(equal, 0, 1, number), (answer, 0, 0, refused)]
    program.append((answer, 0, 0, allowed))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    library = _library()
    library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    return bool(library.prctl(_SECCOMP, _FILTER, header, 0, 0) == 0)


# --- everywhere: Python's audit events ---------------------------------------------------------------------------

_FORBIDDEN = ("socket.", "subprocess.", "os.posix_spawn", "os.spawn", "os.exec", "os.fork", "os.system", "os.kill",
              "os.startfile", "pty.", "signal.pthread_kill", "ctypes.", "resource.", "_winapi.", "os.set")  # fmt: skip
# Events that change files, and how many of their arguments are paths.
_CHANGES = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2,
            "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.chflags": 1, "os.utime": 1,
            "os.removexattr": 1}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def audit(directory: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses sockets, processes, signals, ctypes, and changes to files outside the directory."""
    root, real, separator = os.path.realpath(directory), os.path.realpath, os.sep

    def outside(path: Any) -> bool:
        if isinstance(path, int) or path == os.devnull:
            return False
        place = real(os.fsdecode(path))
        return place != root and not place.startswith(root + separator)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        paths = arguments[:1] if writes else arguments[: _CHANGES.get(event, 0)]
        if any(outside(path) for path in paths):
            raise PermissionError(f"{event} outside the working directory is not allowed")

    return hook


def confine(directory: str, limits: Mapping[str, int]) -> None:
    """Give up everything that the kernel and Python let a process give up."""
    isolate_network()
    die_with_parent()
    deny_files(directory)
    limit(limits)
    deny_system_calls()
    sys.addaudithook(audit(directory))


def program(before: str, code: str) -> CodeType:
    """`code` behind what stands before it, where the two are Python together; else alone.

    Raises:
        SyntaxError: it is not Python alone, either.
    """
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return compile(before + code, "solution.py", "exec")
    return compile(code, "solution.py", "exec")


def run(before: str, code: str, tests: str, passed: Callable[[int], None]) -> None:
    """Run the code, then each test; `passed` hears of every one that raised nothing."""
    names: dict[str, Any] = {"__name__": "solution"}
    with contextlib.suppress(BaseException):  # the tests show what a program that fails has defined
        exec(program(before, code), names)
    index = 0
    for node, is_test in statements(tests):
        try:
            exec(compile(ast.Module([node], []), "tests.py", "exec"), names)
        except BaseException:
            works = False
        else:
            works = True
        if is_test and works:
            passed(index)
        index += is_test


def show(code: str) -> None:
    """Run the code; print the value of its last statement where that is an expression, or its exception."""
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        body = ast.parse(code).body
        last = body[-1] if body else None
        before = body[:-1] if isinstance(last, ast.Expr) else body
        exec(compile(ast.Module(before, []), "program.py", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "program.py", "eval"), names)
            if value is not None:
                print(repr(value))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
    sys.stdout.flush()


def main() -> None:
    task = json.load(sys.stdin)
    report, token = os.dup(1), task.get("token")
    with open(os.devnull, "r+b") as nothing:
        for descriptor in (0, 2) if token is None else (0, 1, 2):
            os.dup2(nothing.fileno(), descriptor)
    confine(os.getcwd(), task["limits"])
    if token is None:
        show(task["code"])
        os._exit(0)

    def passed(index: int) -> None:
        os.write(report, f"{token} {index}\n".encode())

    run(task["before"], task["code"], task["tests"], passed)
    os._exit(0)


if __name__ == "__main__":
    main()
