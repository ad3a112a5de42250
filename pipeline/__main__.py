"""Entry point of ``python -m pipeline``."""

import importlib.abc
import io
import os
import sys

from pipeline.cli import STAGES, main


class _WithoutPandas(importlib.abc.MetaPathFinder):
    """As if pandas were not installed.

    pyarrow imports it when it first converts anything, to know its types again: a third of the start of a stage, none
    of which uses it.
    """

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("stages run without pandas", name=fullname)


if sys.argv[1:2] and sys.argv[1] in (*STAGES, "warm-server"):  # in their workers, too, which also start here
    sys.meta_path.insert(0, _WithoutPandas())


def run() -> int:
    """Run the command line; a stage in a warm process, where this run has one."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal may lack a name's characters
    if "NUCLEUS_PIPELINE_WARM" in os.environ and sys.argv[1:2] and sys.argv[1] in STAGES:
        from pipeline.warm import ask_server

        status = ask_server(sys.argv[1:])
        if status is not None:
            return status
    return main()


if __name__ == "__main__":
    sys.exit(run())
