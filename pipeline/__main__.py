"""Entry point of ``python -m pipeline``."""

import importlib.abc
import io
import os
import sys

from pipeline.cli import STAGES, main


class _WithoutPandas(importlib.abc.MetaPathFinder):
    """Import hook that makes pandas appear not to be installed.

    pyarrow imports pandas on its first conversion, only to recognise pandas types. That takes a third of the start-up
    time of a stage, and no stage uses pandas.
    """

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("stages run without pandas", name=fullname)


if sys.argv[1:2] and sys.argv[1] in (*STAGES, "warm-server"):  # worker processes start here as well
    sys.meta_path.insert(0, _WithoutPandas())


def run() -> int:
    """Run the command line; a stage runs on the warm server if this run has one."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal may lack characters of a name
    if "NUCLEUS_PIPELINE_WARM" in os.environ and sys.argv[1:2] and sys.argv[1] in STAGES:
        from pipeline.batch.warm import ask_server

        status = ask_server(sys.argv[1:])
        if status is not None:
            return status
    return main()


if __name__ == "__main__":
    sys.exit(run())
