"""Set Prefect (and the threads beside it) up before it is imported: private, quiet, on this machine.

Whatever the user has set stays. By default Prefect's own embedded server keeps its state in the workspace, sends
nothing anywhere, and has time to start on a slow machine. With its analytics on, it would call home and
race its own database.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from medtl.artifacts import storage_errors
from medtl.errors import MedtlError, StorageError

LEAST_FILE_BYTES = 64 << 20  # a file-size limit below this breaks Prefect's database, not only ours
SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # one clear sentence from us, not a traceback from each layer
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "OMP_WAIT_POLICY": "PASSIVE",  # torch's threads would spin while another program has their core
}


def prepare_prefect(workspace: Path) -> None:
    """Put the settings into the environment; make Prefect's home (0700) in the workspace.

    Raises:
        StorageError: the workspace cannot be written, or a file-size limit leaves no room for a database.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    home = workspace.absolute() / "prefect"
    with storage_errors(workspace):
        workspace.mkdir(parents=True, exist_ok=True, mode=0o700)
        home.mkdir(mode=0o700, exist_ok=True)
    os.environ.setdefault("PREFECT_HOME", str(home))
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < LEAST_FILE_BYTES:
        raise StorageError(
            f"Files may not grow past {limit} bytes here (ulimit -f), which is as good as a full disk: a run needs at "
            f"least {LEAST_FILE_BYTES >> 20} MB. Nothing that was finished is lost; raise the limit and run the same "
            "command again."
        )


@contextlib.contextmanager
def server(workspace: Path, timeout_s: float = 120.0) -> Iterator[str]:
    """Run Prefect's server on a free loopback port while schedules are served; give its API's address.

    A server that the user named (PREFECT_API_URL) is used instead.

    Raises:
        MedtlError: it does not answer in time.
    """
    named = os.environ.get("PREFECT_API_URL")
    if named:
        yield named
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    output = workspace.absolute() / "prefect" / "server.log"
    with output.open("ab") as stream:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, stdout=stream, stderr=stream)  # noqa: S603 - our own interpreter
        try:
            _wait(process, f"{url}/health", timeout_s, output)
            os.environ["PREFECT_API_URL"] = url
            yield url
        finally:
            os.environ.pop("PREFECT_API_URL", None)
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def stop_server() -> None:
    """Stop the server that Prefect started for this process's flows, which it does itself only at an ordinary exit."""
    started = sys.modules.get("prefect.server.api.server")
    if started is not None:
        started.SubprocessASGIServer().stop()


@contextlib.contextmanager
def ended_by_signals(within_s: float = 20.0) -> Iterator[None]:
    """End this process, with the code of its signal, where SIGTERM or SIGINT has not done so within some seconds.

    A stopped flow tells Prefect's server before it goes. Where the whole group of processes was stopped, as service
    managers and Ctrl-C do it, nobody answers, and Prefect asks for minutes. What steps have saved is whole either way.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        while number := heard.recv(1):  # nothing: closed
            if number[0] in (signal.SIGTERM, signal.SIGINT) and not over.wait(within_s):
                sys.stderr.write("medtl: stopped by a signal; the same command goes on from here.\n")
                stop_server()
                os._exit(128 + number[0])

    threading.Thread(target=watch, daemon=True, name="medtl-signals").start()
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        told.close()


def _wait(process: subprocess.Popen[bytes], url: str, timeout_s: float, output: Path) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - loopback
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
        else:
            return
    raise MedtlError(f"Prefect's server did not start within {timeout_s:g} s; its output is in '{output}'.")


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Turn what Prefect raises about itself into one sentence; our own errors pass.

    Raises:
        MedtlError: Prefect's server did not start or was lost.
    """
    import httpx
    from prefect.exceptions import PrefectException

    try:
        yield
    except (PrefectException, httpx.HTTPError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "server" not in str(error).lower():
            raise
        raise MedtlError(
            f"Prefect's server did not start or was lost ({type(error).__name__}). What was finished is kept: run the "
            "same command again; PREFECT_API_URL, if set, must name a server that answers."
        ) from error
