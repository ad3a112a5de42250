"""Command line: ``python -m pipeline COMMAND ...``. Only the module of the given command is imported."""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import __version__
from pipeline.errors import PipelineError
from pipeline.machine.allocator import share_heap


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Parameters
    ----------
    module : str
        Module that implements it.
    help : str
        What it does, in one line.
    add_arguments, main : str
        Names of the module's functions that declare the command's arguments and that run it.
    """

    module: str
    help: str
    add_arguments: str = "add_arguments"
    main: str = "main"


STAGES = {
    "inspect": Command("pipeline.slides.inspect", "open a slide, find its pixel size, prove that its tissue decodes"),
    "tissue": Command("pipeline.tissue", "outline the tissue of a slide"),
    "tiles": Command("pipeline.tiles", "store the tissue's pixels at the model's pixel size"),
    "stain": Command("pipeline.stain", "fit the slide's stain transform towards the model's reference"),
    "infer": Command("pipeline.inference", "run the network: maps of nuclei"),
    "instances": Command("pipeline.instances", "separate the nuclei: one polygon each"),
    "measure": Command("pipeline.measure", "measure shape and stain of each nucleus"),
    "export": Command("pipeline.export", "write the nuclei as GeoJSON for QuPath"),
    "summary": Command("pipeline.summary", "metrics and overview picture of a slide"),
    "labels": Command("pipeline.label_export", "write the nuclei as a label map, where export.labels is set"),
    "classify": Command("pipeline.classify", "tell classes of nuclei apart, where a classifier is set"),
    "regions": Command("pipeline.regions", "count the nuclei of regions drawn on a slide, where the table has them"),
    "cohort": Command("pipeline.cohort", "tables and report of all slides, and what failed"),
}
TOOLS = {
    "status": Command("pipeline.status", "how far a run has come: slides by stage, rate, time left, failures"),
    "slide-table": Command("pipeline.batch.slide_table", "write the table of slides that a folder or table stands for"),
    "evaluate": Command("pipeline.evaluation.command", "compare nuclei with known ones: AJI, PQ, Dice, F1, mPQ+, R2"),
    "masks": Command("pipeline.training.masks", "draw ImageScope annotations as masks and instance label maps"),
    "reference": Command("pipeline.training.reference", "choose the field whose stain the others are brought to"),
    "synthesize": Command("pipeline.training.synthesis", "paint fields of H&E around random nuclei, to train on"),
    "train": Command("pipeline.training.command", "train a network and pack it as a model"),
    "ensemble": Command("pipeline.training.ensemble", "join trained models as one: the mean of their maps"),
    "classifier": Command("pipeline.training.classifier", "learn to tell classes of nuclei from some named in QuPath"),
    "networks": Command("pipeline.networks.command", "list the networks: size, cost, heads, source"),
    "training-summary": Command(
        "pipeline.training.command",
        "tables of a cross-validation, a comparison or a transfer",
        "add_summary_arguments",
        "main_summary",
    ),
    "warm-server": Command("pipeline.batch.warm", "start stages for a run on this machine (the setting warm_start)"),
    "doctor": Command("pipeline.doctor", "say what this machine has and what is wrong"),
    "demo-slides": Command(
        "pipeline.demo", "write synthetic slides with known nuclei", "add_slides_arguments", "main_slides"
    ),
    "demo-table": Command("pipeline.demo", "print the table of a finished run", "add_table_arguments", "main_table"),
}
COMMANDS = {**STAGES, **TOOLS}


_HINTS = {
    errno.ENOSPC: "make room there and run the same command again",
    errno.EDQUOT: "make room there and run the same command again",
    errno.EFBIG: "raise the limit on the size of files and run the same command again",
    errno.EROFS: "choose another folder",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EIO: "check the disk or the file server and run the same command again",
    errno.ESTALE: "check the file server and run the same command again",
}


def overview() -> str:
    """Return the help text, with one line per command."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: python -m pipeline COMMAND ...",
        "",
        "Whole-slide nucleus pipeline. A run goes through Snakemake, which calls the stages:",
        "  snakemake --cores 8 --config slides=FOLDER results=FOLDER",
    ]
    for title, commands in (("stages, in order:", STAGES), ("tools:", TOOLS)):
        lines += ["", title, *(f"  {name:<{width}}  {command.help}" for name, command in commands.items())]
    lines += ["", "python -m pipeline COMMAND --help shows a command's options; --version the version."]
    return "\n".join(lines)


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one command.

    Parameters
    ----------
    name : str
        A key of `COMMANDS`.
    arguments : sequence of str
        The arguments that follow it on the command line.

    Returns
    -------
    int
        Exit status.
    """
    from pipeline import logs

    if name in STAGES:
        share_heap()
        # Stages have hardly any linear algebra, but OpenBLAS starts one thread per core, and these busy-wait for it.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # Imports create hundreds of thousands of objects that all stay, and the collector would scan them many times.
        gc.set_threshold(50_000)
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(prog=f"python -m pipeline {name}", description=f"{command.help}.")
    parser.add_argument("-v", "--verbose", action="store_true", help="more messages")
    getattr(module, command.add_arguments)(parser)
    args = parser.parse_args(arguments)
    logs.configure(args.verbose)
    status: int = getattr(module, command.main)(args)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns
    -------
    int
        0: success; 1: the system refused something (disk full, no permission), or the command found a problem;
        2: a wrong setting, file or option; 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if arguments else 2
    name = arguments[0]
    if name in ("-V", "--version"):
        print(f"nucleus-pipeline {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: unknown command {name!r} (python -m pipeline --help lists them)", file=sys.stderr)
        return 2
    try:
        return run(name, arguments[1:])
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of standard output has ended, as in `... | head`.
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        what = " ".join(str(error.strerror or error).split())
        hint = f" ({_HINTS[error.errno]})" if error.errno in _HINTS else ""
        print(f"error: {name}: {where}{what}{hint}", file=sys.stderr)
        return 1
