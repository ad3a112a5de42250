"""Warm start of stages: they are forked from a server process that has their libraries in memory.

The stages of a small slide take less time than the start of Python and its libraries. If the setting ``warm_start`` is
on, the Snakemake process starts a server, and ``python -m pipeline STAGE`` sends it its arguments, environment, working
directory and standard streams. The server forks, the child runs the stage as the command itself would, and the command
ends with the child's exit status. If a command is killed, the server kills its child. When Snakemake ends, for whatever
reason, the server and its children end as well.
"""

from __future__ import annotations

import argparse
import array
import ctypes
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ADDRESS = "NUCLEUS_PIPELINE_WARM"
"""Environment variable with the path of the server's socket."""

LIBRARIES = (
    "PIL.Image", "PIL.ImageDraw", "PIL.ImageFont", "PIL.PngImagePlugin", "cv2", "matplotlib.backends.backend_agg",
    "matplotlib.collections", "matplotlib.figure", "matplotlib.font_manager", "matplotlib.patheffects", "orjson",
    "pipeline.evaluation.readers", "pipeline.pictures.overview", "pipeline.slides.open", "pipeline.staintools_backend",
    "pyarrow.parquet", "scipy.ndimage", "scipy.sparse.csgraph", "shapely.geometry", "skimage.measure",
    "skimage.segmentation", "tifffile", "tiffslide", "zarr.codecs",
)  # fmt: skip
"""Modules that stages import late, which the server imports in advance. Not torch: CUDA does not survive a fork."""

_PATIENCE_S = 30.0
"""Seconds that the server waits for a command's request, which comes at once unless the command is suspended."""

_PR_SET_PDEATHSIG = 1
_HEADER = struct.Struct("!I")


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def possible() -> bool:
    """Whether the server works on this system."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


@dataclass
class Server:
    """Handle of a server for the process that started it.

    Parameters
    ----------
    process : subprocess.Popen
        The server's process.
    folder : pathlib.Path
        Folder of its socket.
    """

    process: subprocess.Popen[bytes]
    folder: Path

    def stop(self) -> None:
        """End the server and remove its socket."""
        os.environ.pop(ADDRESS, None)
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def start_server() -> Server | None:
    """Start a server, and put its address into the environment of this process for its commands.

    Returns
    -------
    Server or None
        The server, to be stopped at the end of the run; it also ends when this process ends. None if the folder for
        temporary files is full, missing, or has too long a name: then the run goes on without a server.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        folder = Path(tempfile.mkdtemp(prefix="nucleus-pipeline-"))
        address = str(folder / "socket")
        try:
            listener.bind(address)
        except OSError:
            folder.rmdir()
            raise
    except OSError as error:
        listener.close()
        print(f"warning: no warm start: {error} (set TMPDIR to a folder with a short name)", file=sys.stderr)
        return None
    listener.listen(64)
    command = [sys.executable, "-m", "pipeline", "warm-server", str(listener.fileno()), str(os.getpid())]
    # Threads of numerical libraries would not survive a fork.
    quiet = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
    process = subprocess.Popen(
        command, pass_fds=[listener.fileno()], env=os.environ | quiet, stdin=subprocess.DEVNULL, start_new_session=True
    )
    listener.close()
    os.environ[ADDRESS] = address
    return Server(process, folder)


def ask_server(arguments: list[str]) -> int | None:
    """Let the server run a command.

    Parameters
    ----------
    arguments : list of str
        The command line.

    Returns
    -------
    int or None
        The command's exit status. None if there is no server, so that the command must run in this process.
    """
    address = os.environ.get(ADDRESS)
    if address is None:
        return None
    with socket.socket(socket.AF_UNIX) as connection:
        environment = {key: value for key, value in os.environ.items() if key != ADDRESS}
        request = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": environment}).encode()
        sys.stdout.flush()
        sys.stderr.flush()
        streams = array.array("i", [0, 1, 2]).tobytes()
        try:
            connection.connect(address)
            connection.sendmsg([_HEADER.pack(len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
            connection.sendall(request)
            answer = connection.recv(1)
        except OSError:  # also if the server ends before it has read the whole request
            return None
    if answer:
        return answer[0]
    # The server has ended, or its child was killed: report it as a shell reports a killed command.
    why = "its process was killed, as when memory runs out (run the same command again, with fewer --cores then)"
    print(f"error: {arguments[0]}: {why}", file=sys.stderr)
    return 128 + signal.SIGKILL


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive a command's request and its standard streams. All other commands wait in the meantime."""
    connection.settimeout(_PATIENCE_S)
    header, streams, _, _ = socket.recv_fds(connection, _HEADER.size, 3)
    try:
        (size,) = _HEADER.unpack(header)
        parts = []
        while size:
            part = connection.recv(min(size, 1 << 20))
            if not part:
                raise ConnectionError("the command has gone")
            parts.append(part)
            size -= len(part)
        request: dict[str, Any] = json.loads(b"".join(parts))
    except BaseException:
        for stream in streams:
            os.close(stream)
        raise
    connection.settimeout(None)
    return request, streams


def _run(request: dict[str, Any], streams: list[int]) -> int:
    """Run a requested command in this process, with the environment and streams of the command that sent it."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[1:] = request["arguments"]
    from pipeline.cli import main

    try:
        return main(request["arguments"])
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def serve(listener: socket.socket, parent: int) -> NoReturn:
    """Serve requests of commands until killed.

    Parameters
    ----------
    listener : socket.socket
        The socket on which commands connect.
    parent : int
        The process with which the server ends.
    """
    _die_with_parent(parent)
    from pipeline.cli import STAGES

    for name in [*(command.module for command in STAGES.values()), *LIBRARIES]:
        with suppress(ImportError):
            importlib.import_module(name)
    me = os.getpid()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    running: dict[int, socket.socket] = {}
    while True:
        for key, _ in selector.select():
            if key.data is None:
                connection, _ = listener.accept()
                try:
                    request, streams = _receive(connection)
                except (OSError, ValueError, struct.error):
                    connection.close()
                    continue
                child = os.fork()
                if child == 0:
                    status = 1
                    try:
                        _die_with_parent(me)
                        os.setpgid(0, 0)
                        selector.close()
                        for other in (listener, *running.values()):
                            other.close()
                        status = _run(request, streams) & 0xFF
                        connection.sendall(bytes([status]))
                    finally:
                        os._exit(status)
                for stream in streams:
                    os.close(stream)
                running[child] = connection
                # A command sends nothing after its request, so the connection becomes readable only when it ends.
                selector.register(connection, selectors.EVENT_READ, ("gone", child))
                selector.register(os.pidfd_open(child), selectors.EVENT_READ, ("ended", child))
                continue
            what, child = key.data
            if child not in running:  # the child has ended already, and then its command
                continue
            if what == "gone":
                selector.unregister(key.fileobj)
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(child, signal.SIGKILL)
                continue
            os.waitpid(child, 0)
            selector.unregister(key.fileobj)
            os.close(key.fd)
            connection = running.pop(child)
            with suppress(KeyError):
                selector.unregister(connection)
            connection.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline warm-server``."""
    parser.add_argument("listener", type=int, help="number of the open socket")
    parser.add_argument("parent", type=int, help="process with which the server ends")


def main(args: argparse.Namespace) -> NoReturn:
    """Run ``python -m pipeline warm-server``."""
    serve(socket.socket(fileno=args.listener), args.parent)
