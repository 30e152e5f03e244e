"""Programs in a terminal, as a person sees them."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading

import pyte
from conftest import ENV, ROOT, until

from protocol import CLEAR


class Display(pyte.Screen):
    """A terminal's screen that counts how often its lines scroll."""

    scrolled = 0

    def index(self):
        self.scrolled += self.cursor.y == self.lines - 1
        super().index()


class Terminal:
    """A program in a terminal of its own, of so many columns and lines. raw: all that it wrote; code: its
    exit code, once it has ended."""

    def __init__(self, *command, columns=80, lines=24, **env):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # it may be ignored where tests run unattended
            os.chdir(ROOT)
            env = {"TERM": "xterm-256color", **ENV, **env}
            os.execve(sys.executable, [sys.executable, *map(str, command)], env)
        self.raw, self.code = b"", None
        self.display = Display(columns, lines)
        self.stream, self.lock = pyte.ByteStream(self.display), threading.Lock()
        self.resize(columns, lines)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def resize(self, columns, lines):
        with self.lock:
            self.display.resize(lines, columns)
            fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def read(self):
        with contextlib.suppress(OSError):  # the program has ended
            while data := os.read(self.fd, 1 << 16):
                with self.lock:
                    self.raw += data
                    self.stream.feed(data)

    @property
    def text(self):
        with self.lock:
            return "\n".join(line.rstrip() for line in self.display.display)

    @property
    def foot(self):
        """The line in which the cursor stands."""
        with self.lock:
            return self.display.display[self.display.cursor.y].rstrip()

    def drawn(self):
        """(lines of the log as they came, without what was wiped; drawings of the live line)"""
        *whole, rest = self.raw.decode().split("\r\n")
        drawn = [text for line in [*whole, rest] for text in line.split(CLEAR)[:-1]]
        return [line.split(CLEAR)[-1] for line in whole], drawn

    def see(self, pattern):
        """The match of a pattern with the screen, as soon as there is one."""
        with self.telling():
            return until(lambda: re.search(pattern, self.text, re.MULTILINE), pattern)

    def wait_for(self, pattern):
        """The match of a pattern with the line at the foot."""
        with self.telling():
            return until(lambda: re.search(pattern, self.foot), pattern)

    @contextlib.contextmanager
    def telling(self):
        try:
            yield
        except BaseException:
            print(self.text)
            raise

    def wait(self):
        """The exit code, once the program has ended."""

        def end():
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            return (os.waitstatus_to_exitcode(status),) if pid else None

        (self.code,) = until(end, "the program has ended")
        self.reader.join(5)
        return self.code

    def close(self):
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self.fd)
