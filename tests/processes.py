"""Processes of Python that begin with capszoo imported: forks of one that imported it, in 0.1 s instead of 4.

`start` and `run` are subprocess's Popen and run as far as the tests need them, for a script or `-c CODE`. What capszoo
reads when it is imported, such as its variables of the environment, needs a process of its own: see subprocess.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading

IMPORTED = (
    "capszoo.command_line",
    "sklearn.datasets",
    "matplotlib.pyplot",
    "capszoo.explore",
    "sqlalchemy",
    "alembic.command",
    "plotly.graph_objects",
)


class Process:
    """A forked process, with the names of `subprocess.Popen`."""

    def __init__(self, args, pid, ended, pipes):
        self.args, self.pid, self.returncode = args, pid, None
        self._ended = ended
        self.stdout, self.stderr = pipes

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            with self._ended:
                status = self._ended.read()
            self.returncode = os.waitstatus_to_exitcode(int(status))
        return self.returncode

    def communicate(self, timeout=None):
        texts = {}
        waiting = [pipe for pipe in (self.stdout, self.stderr) if pipe is not None]
        while waiting:
            ready = select.select(waiting, [], [], timeout)[0]
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout)
            for pipe in ready:
                some = os.read(pipe.fileno(), 2**16)
                texts[pipe] = texts.get(pipe, b"") + some
                if not some:
                    waiting.remove(pipe)
                    pipe.close()
        self.wait(timeout)
        return tuple(texts[pipe].decode() if pipe in texts else None for pipe in (self.stdout, self.stderr))

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=None, env=None):
    """Start `python ARGS`, where the first of `args` is a script or -c."""
    args = [*map(str, args)]
    if not hasattr(os, "fork"):
        return subprocess.Popen([sys.executable, *args], stdout=stdout, stderr=stderr, cwd=cwd, env=env, text=True)
    server = _server()
    theirs, pipes = [os.open(os.devnull, os.O_RDONLY)], []
    for number, given in enumerate((stdout, stderr), 1):
        pipe = None
        if given is subprocess.PIPE:
            reading, given = os.pipe()
            pipe = open(reading, "rb", buffering=0)
        elif given is subprocess.STDOUT:
            given = os.dup(theirs[1])
        elif given is subprocess.DEVNULL:
            given = os.open(os.devnull, os.O_WRONLY)
        else:
            given = os.dup(number if given is None else given.fileno())
        theirs.append(given)
        pipes.append(pipe)
    reading, ended = os.pipe()
    request = {"args": args, "cwd": str(cwd or os.getcwd()), "env": dict(os.environ if env is None else env)}
    message = json.dumps(request).encode()
    socket.send_fds(server, [b"%10d" % len(message)], [*theirs, ended])
    server.sendall(message)
    for number in (*theirs, ended):
        os.close(number)
    return Process(args, int(server.recv(10)), open(reading), pipes)


def run(*args, timeout=300, check=False, **kwargs):
    """Run `python ARGS` to its end; return a `subprocess.CompletedProcess`."""
    process = start(*args, **kwargs)
    try:
        out, err = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, args, out, err)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


_servers = {}


def _server():
    """The socket of this process's server, which is started when it is needed first."""
    if os.getpid() not in _servers:
        ours, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno())]
        # Forks share what the first process knows of the GPU: it must not ask the driver itself.
        env = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        server = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, env=env)  # fmt: skip
        theirs.close()
        atexit.register(lambda: (ours.close(), server.wait()))
        _servers[os.getpid()] = ours
    return _servers[os.getpid()]


def serve(connection):
    """Fork for each request until the connection ends; in a fork, return its request."""
    waking, woken = os.pipe()
    os.set_blocking(woken, False)
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken)
    running = {}
    while True:
        ready = select.select([connection, waking], [], [])[0]
        if waking in ready:
            os.read(waking, 2**10)
            while running:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                ended = running.pop(pid)
                os.write(ended, b"%d" % status)
                os.close(ended)
        if connection not in ready:
            continue
        length, numbers, _, _ = socket.recv_fds(connection, 10, 4)
        if not length:
            raise SystemExit
        message = b""
        while len(message) < int(length):
            message += connection.recv(int(length) - len(message))
        *standard, ended = numbers
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, before)
            # A shell that starts the tests in the background lets them ignore Ctrl-C, which forks are sent.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for to, number in enumerate(standard):
                os.dup2(number, to)
            for number in (*numbers, waking, woken, *running.values()):
                os.close(number)
            connection.close()
            return json.loads(message)
        for number in standard:
            os.close(number)
        running[pid] = ended
        connection.sendall(b"%10d" % pid)


def main():
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork that collects would copy all of it
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    random.seed()  # or all forks would draw the same numbers
    sys.modules["numpy"].random.seed()
    script, *arguments = request["args"]
    if "--report" not in arguments:  # drawing takes longer than the training of most tests
        import capszoo.report

        capszoo.report.write_run_report = lambda folder, *_: folder / "report.html"
    status = 0
    try:
        if script == "-c":
            code, *arguments = arguments
            sys.argv, sys.path[0] = ["-c", *arguments], ""
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
            runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if not isinstance(ended.code, (int, type(None))):
            raise
        status = ended.code or 0
    # What Python does at its end, but for taking all modules apart, which takes 0.4 s.
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
