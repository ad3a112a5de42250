# Settings, slides and model of the run, its locks and its start and end. Parsed again in every cluster job, so nothing
# here decodes a slide.
import atexit
import functools
import hashlib
import inspect
import json
import os
import sys
from collections import Counter
from pathlib import Path

from snakemake.cli import get_argument_parser
from snakemake_interface_executor_plugins.settings import DeploymentMethod

if workflow.basedir not in sys.path:
    sys.path.insert(0, str(workflow.basedir))

from pipeline.batch.again import NOTES, Restart, clear_marks
from pipeline.errors import PipelineError
from pipeline.machine.gpus import present
from pipeline.layout import OPTIONAL_STAGES, STAGES, RunLayout, folder_name
from pipeline.batch.lock import OWNER, RESULTS, check_owner, lock_run, owner, runs_jobs
from pipeline.networks.registry import needs_torch
from pipeline.batch.settings import (
    check_folder,
    check_licence,
    check_model,
    check_passed,
    check_same_results,
    check_settings,
    check_stain,
    file_sha256,
    load_schema,
)
from pipeline.batch.slide_table import (
    UNREADABLE,
    check_apart,
    check_same_slides,
    content_stamp,
    out_of_reach,
    readable,
    renew_table,
    resolve_slides,
    slide_bytes,
)
from pipeline.batch.stage import clear_finished, clear_remains
from pipeline.status import closing_words, some
from pipeline.training.inherit import inherited
from pipeline.batch.warm import possible, start_server

# Jobs run `python -m pipeline` from this checkout, whatever the working directory holds, with the `python` that runs
# Snakemake, unless the rules have conda environments.
ENVIRONMENT = dict(os.environ)
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(workflow.basedir), *filter(None, [ENVIRONMENT.get("PYTHONPATH")])])
ENVIRONMENT["PYTHONSAFEPATH"] = "1"
if DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method:
    ENVIRONMENT["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), ENVIRONMENT.get("PATH", os.defpath)])
os.environ.update(ENVIRONMENT)


def stop(error):
    """Exit with a one-line error before any job runs."""
    sys.exit(f"error: {error}")


def beside(model):
    """Return a model's folder: the path as given or, if only that exists, the same path beside the Snakefile."""
    shipped = Path(workflow.basedir, model)
    return str(shipped) if shipped.exists() and not Path(model).exists() else model


SCHEMA = load_schema(Path(workflow.basedir, "workflow/schemas/config.schema.yaml"))
try:
    if isinstance(config.get("train"), dict):
        config["train"] = inherited(config["train"], beside)
    if workflow.is_main_process and workflow.non_local_exec:
        check_passed(workflow.config_settings.config_args or ())
    config.update(check_settings(config, SCHEMA))
    for place in filter(config.get, ("results", "scratch")):
        check_folder(place, Path(config[place]))
except PipelineError as error:
    stop(error)

RUN = RunLayout(Path(config["results"]))
ONE = RUN.folder("{slide}")


MODEL = Path(beside(config["model"]))
MODEL_CARD, MODEL_WEIGHTS = str(MODEL / "model.json"), str(MODEL / "weights.safetensors")

# Targets that need no slides, with the folder that each works in.
TRAINS = dict.fromkeys(("train", "crossval", "transfer"), RUN.training(config["train"]["name"]))
TRAINS |= {"compare": RUN.training(config["compare"]["name"]), "synthesize": RUN.synthesis(config["synthesis"]["name"])}

# Rules and files that the command line asks for. Snakemake knows them only after it has parsed the workflow.
TARGETS = get_argument_parser().parse_known_args(sys.argv[1:])[0].targets if workflow.is_main_process else []

# Slides and model are not checked if the command line names a target, a file or an option that needs none, unless it
# names the target `all` as well.
NEEDS_SLIDES = "all" in TARGETS or not (
    {"--lint", "--unlock", "--list-rules", "-l"}.intersection(sys.argv[1:])
    or any(
        target in TRAINS or {RUN.results / "training", RUN.results / "synthesis"}.intersection(Path(target).parents)
        for target in TARGETS
    )
)

SLIDES = None
try:
    SLIDES = resolve_slides(config["slides"])
    if workflow.is_main_process and NEEDS_SLIDES:
        check_apart(config["slides"], SLIDES, RUN)
        CARD = check_model(MODEL)
        check_licence(CARD, MODEL, config["licences"])
        check_stain(CARD, MODEL, config["stain"]["method"], config["stain"]["strength"])
        if config["classifier"] is not None:
            from pipeline.models.classifier import check_classifier  # it needs NumPy

            check_classifier(Path(config["classifier"]), CARD)
        if SLIDES.left_out:
            told = f"slides: {len(SLIDES)} in {config['slides']!r}, left out: {SLIDES.left_out}"
            print(f"{told} (a slide table can name them)", file=sys.stderr)
except PipelineError as error:
    if workflow.is_main_process and NEEDS_SLIDES:
        stop(error)
    SLIDES_ERROR = str(error)

# Files that stages find through the environment: in one they note damaged stores that they have removed, the other
# lists the slides that could not be read when the run started (a slide that disappears later is not to blame).
os.environ.update({NOTES: str(RUN.damaged), UNREADABLE: str(RUN.unreadable)})

# In the environment instead of a rule's parameters: it changes no result, so a new value must not rerun anything.
os.environ.update(ON_BAD_SLIDE=config["on_bad_slide"])

# One run at a time per results folder, and one per training. The locks end with this process, however it ends;
# Snakemake's own lock, which outlives a killed run, is off in the profiles. Jobs recognise their run by the text that
# it wrote into the first lock.
LOCKS, RESTART = {}, None
if workflow.is_main_process and runs_jobs(sys.argv[1:]) and "so_far" not in TARGETS:
    PLACES = sorted({TRAINS[target] for target in TARGETS if target in TRAINS})
    if "all" in TARGETS or not PLACES:
        PLACES.insert(0, RUN.results)
    try:
        LOCKS = {place: lock_run(place) for place in PLACES}
    except PipelineError as error:
        stop(error)
    os.environ.update({RESULTS: str(PLACES[0]), OWNER: owner(PLACES[0])})
    if RUN.results in LOCKS:
        clear_marks(RUN.damaged)
        if "snakemake" in Path(sys.argv[0]).parts:
            RESTART = Restart(RUN.damaged)
    if None in LOCKS.values():
        print(f"warning: no locks on this file system: start no second run in {RUN.results}", file=sys.stderr)
if not workflow.is_main_process:
    try:
        check_owner()
    except PipelineError as error:
        stop(error)


# JOB_ATTEMPTS is how often a job is tried. Snakemake starts cluster jobs without retries, so they take the number from
# the environment; if that does not reach them, they take each attempt for the last. It is known once the run starts.
if workflow.is_main_process:
    os.environ.update(JOB_ATTEMPTS="1")


onstart:
    os.environ.update(JOB_ATTEMPTS=str(1 + workflow.execution_settings.retries))
    # Remove Snakemake's default limit of 100 jobs per second, which no run comes near. With it, each job that ends
    # makes the scheduler look at all ready jobs once more per second, until that keeps a core busy. Any other limit,
    # e.g. from a profile, stays.
    limit = workflow.scheduling_settings.max_jobs_per_timespan
    if limit is not None and (limit.max_jobs, limit.timespan) == (100, 1):
        workflow.scheduler.job_rate_limiter = None
    if RESTART is not None and SLIDES is not None:
        RUN.unreadable.write_text(
            "".join(f"{slide.name}\n" for slide in SLIDES if not readable(slide.path)), "utf-8"
        )
        atexit.register(clear_passing)
    # No automatic restart if jobs are forced to run again: the second run would force them once more.
    told = workflow.dag_settings
    if RESTART is not None and not (
        told.forceall or told.forcetargets or told.forcerun or workflow.overwrite_workdir
    ):
        RESTART.begin()
    # The warm server can only run jobs of this machine, in the environment that runs Snakemake.
    own = DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method
    wanted = config["warm_start"] if config["warm_start"] is not None else sum(map(is_small, BY_FOLDER)) >= 10
    if wanted and workflow.local_exec and own and possible():
        server = start_server()
        if server is not None:
            atexit.register(server.stop)


ERRORS = []


onerror:
    ERRORS.append(True)
    damaged = [] if RESTART is None else RESTART.end()
    if damaged:
        print(
            f"{', '.join(map(str, damaged))} had been damaged: the same command starts once more, to make it again",
            file=sys.stderr,
        )


def tell():
    """Print at the end of a run how far it has come and what to do next."""
    if RUN.slide_table.is_file():  # otherwise the run has not begun
        try:
            print(f"\n{closing_words(RUN.results, bool(ERRORS))}", file=sys.stderr)
        except PipelineError as error:
            print(f"warning: {error}", file=sys.stderr)


# At exit, so that it is printed even if there was nothing to do. A command that restarts prints it only after its
# second run.
if RESTART is not None and SLIDES is not None:
    atexit.register(tell)


wildcard_constraints:
    slide="[^/]+",


BY_FOLDER = {} if SLIDES is None else {folder_name(slide.name): slide for slide in SLIDES}
WITH_REGIONS = any(slide.regions is not None for slide in BY_FOLDER.values())
SLIDES_IN = Counter(slide.path.parent for slide in BY_FOLDER.values())
