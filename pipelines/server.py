"""Prefect's server for one command: ``python -m pipelines.server PROCESS PORT``. It ends when that process is gone.

The same application, with the same switches, that Prefect starts by itself for a flow without a server; that one
outlives a command that was killed, and hears the Ctrl-C that was meant for the command.
"""

from __future__ import annotations

import os
import sys
import threading

from pipelines.environment import end_with

SWITCHES = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


def main(started_by: int, port: int) -> None:
    """Serve on a loopback port."""
    threading.Thread(target=end_with, args=(started_by,), daemon=True).start()
    os.environ.pop("PREFECT_API_URL", None)  # its own address, which is the client's to know
    os.environ.update(SWITCHES)
    import uvicorn

    application = "prefect.server.api.server:create_app"
    uvicorn.run(application, factory=True, host="127.0.0.1", port=port, log_level="error", lifespan="on")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
