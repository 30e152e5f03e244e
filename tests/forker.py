"""Starts the tests' processes from one that has imported torch, because importing it takes longer
than most tests: 1.5 s of a core, and 2.5 s with what an optimizer imports at its first step.

A process is forked here, takes this script's place as `__main__` and ends as an interpreter does
that has been started with the same command: with its threads, its exit functions, its traceback and
its exit code. It differs in what has been imported already, so tests of importing ask conftest.py
for a fresh interpreter. Linux only, as elsewhere a fork of a process with libraries may not work.
"""

import gc
import importlib
import json
import os
import select
import socket
import sys


def serve(control):
    """Returns in a process that has been forked, with (its request, its file descriptors). Each
    request comes with an output and a socket, which hears the process id and the exit code."""
    living = {}  # by a descriptor that can be read when the process has ended
    while True:
        for ready in select.select([control, *living], [], [])[0]:
            if ready is not control:
                pid, told = living.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.close(ready)
                os.write(told, b"%d" % code)
                os.close(told)
                continue
            request, given, _, _ = socket.recv_fds(control, 1 << 20, 2)
            if not request:
                os._exit(0)  # the tests have ended
            pid = os.fork()
            if pid == 0:
                control.close()
                for ended, (_, other) in living.items():
                    os.close(ended)
                    os.close(other)
                return json.loads(request), given
            output, told = given
            os.close(output)
            living[os.pidfd_open(pid)] = pid, told
            os.write(told, b"%d" % pid)


def become(request, given):
    """Set the process up for its command, whose code it gives."""
    global __file__
    output, told = given
    os.close(told)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if request["command"][0] == "-c":
        _, code, *arguments = request["command"]
        sys.argv, sys.path[0] = ["-c", *arguments], ""
        del __file__
        return compile(code, "<string>", "exec", dont_inherit=True)
    sys.argv, __file__ = request["command"], request["command"][0]
    sys.path[0] = os.path.dirname(os.path.abspath(__file__))
    with open(__file__, "rb") as file:
        return compile(file.read(), __file__, "exec", dont_inherit=True)


for name in sys.argv[2:]:
    importlib.import_module(name)
gc.freeze()
exec(become(*serve(socket.socket(fileno=int(sys.argv[1])))))
