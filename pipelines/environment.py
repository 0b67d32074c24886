"""Set Prefect (and the threads beside it) up before it is imported: private, quiet, on this machine.

Whatever the user has set stays. By default Prefect's own embedded server keeps its state in the workspace, sends
nothing anywhere, and has time to start on a slow machine. With its analytics on, it would call home and
race its own database.
"""

from __future__ import annotations

import atexit
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
from collections.abc import Callable, Iterator, Sequence
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


_ours: list[subprocess.Popen[bytes]] = []  # servers that this process has started


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
    try:
        yield _start(workspace, ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port"], timeout_s)()
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        stop_servers()


def small_server(workspace: Path, timeout_s: float = 120.0) -> Callable[[], str]:
    """Start the part of Prefect's server that flows need, for all flows of this process and until it ends, however.

    Ctrl-C does not reach it, so that a flow that is interrupted can still say so. A server that the user named
    (PREFECT_API_URL) is used instead.

    Returns:
        What waits for it and tells its API's address; other things may be imported meanwhile. It raises
        :class:`MedtlError` where the server does not answer in time.
    """
    named = os.environ.get("PREFECT_API_URL")
    if named:
        return lambda: named
    atexit.register(stop_servers)
    return _start(workspace, ["-m", "pipelines.server", str(os.getpid())], timeout_s)


def _start(workspace: Path, command: Sequence[str], timeout_s: float) -> Callable[[], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    output = workspace.absolute() / "prefect" / "server.log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with output.open("ab") as stream:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            [sys.executable, *command, str(port)], stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
    _ours.append(process)
    os.environ["PREFECT_API_URL"] = url  # where Prefect, once it is imported, looks for good

    def ready() -> str:
        _wait(process, f"{url}/health", timeout_s, output)
        return url

    return ready


def stop_servers() -> None:
    """Stop the servers of Prefect that this process has started."""
    while _ours:
        process = _ours.pop()
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def ended_by_signals(within_s: float = 5.0) -> Iterator[None]:
    """End this process, with the code of its signal, where SIGTERM or SIGINT has not done so within some seconds.

    A stopped flow tells Prefect's server before it goes. Where all processes were stopped, as service managers do it,
    nobody answers, and Prefect asks for minutes. What steps have saved is whole either way.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        with heard:
            while number := heard.recv(1):  # nothing: closed
                if number[0] in (signal.SIGTERM, signal.SIGINT) and not over.wait(within_s):
                    sys.stderr.write("medtl: stopped by a signal; the same command goes on from here.\n")
                    stop_servers()
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
    how = f"within {timeout_s:g} s" if process.poll() is None else f"(exit code {process.poll()})"
    raise MedtlError(f"Prefect's server did not start {how}; its output is in '{output}'. Run the same command again.")


def end_with(started_by: int) -> None:
    """End this process when the one that asked for it is gone: after a kill nobody else would."""
    while True:
        try:
            os.kill(started_by, 0)
        except OSError:  # gone, or its number is another user's by now
            os._exit(1)
        time.sleep(1.0)


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
