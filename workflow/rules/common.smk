# Settings, slides, model, and the run as a whole. Parsed again in every cluster job: nothing here decodes a slide.
import atexit
import functools
import hashlib
import inspect
import json
import os
import sys
from collections import Counter
from pathlib import Path

from snakemake_interface_executor_plugins.settings import DeploymentMethod

if workflow.basedir not in sys.path:
    sys.path.insert(0, str(workflow.basedir))

from pipeline.again import NOTES, Restart, clear_marks
from pipeline.errors import PipelineError
from pipeline.gpus import present
from pipeline.layout import OPTIONAL_STAGES, STAGES, RunLayout, folder_name
from pipeline.lock import OWNER, RESULTS, check_owner, lock_run, owner, runs_jobs
from pipeline.settings import (
    check_folder,
    check_licence,
    check_model,
    check_same_results,
    check_settings,
    check_stain,
    file_sha256,
    load_schema,
)
from pipeline.slide_table import (
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
from pipeline.stage import clear_remains
from pipeline.status import closing_words, some
from pipeline.warm import possible, start_server

# `python -m pipeline` is this checkout's, whatever the working directory holds; and `python` is the one that runs
# Snakemake, unless conda environments are made for the rules.
ENVIRONMENT = dict(os.environ)
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(workflow.basedir), *filter(None, [ENVIRONMENT.get("PYTHONPATH")])])
ENVIRONMENT["PYTHONSAFEPATH"] = "1"
if DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method:
    ENVIRONMENT["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), ENVIRONMENT.get("PATH", os.defpath)])
os.environ.update(ENVIRONMENT)


def stop(error):
    """End before anything runs, with one line."""
    sys.exit(f"error: {error}")


SCHEMA = load_schema(Path(workflow.basedir, "workflow/schemas/config.schema.yaml"))
try:
    config.update(check_settings(config, SCHEMA))
    for place in filter(config.get, ("results", "scratch")):
        check_folder(place, Path(config[place]))
except PipelineError as error:
    stop(error)

RUN = RunLayout(Path(config["results"]))
ONE = RUN.folder("{slide}")


def beside(model):
    """A model's folder: one that is not below the working directory may be one of those beside the Snakefile."""
    shipped = Path(workflow.basedir, model)
    return str(shipped) if shipped.exists() and not Path(model).exists() else model


MODEL = Path(beside(config["model"]))
MODEL_CARD, MODEL_WEIGHTS = str(MODEL / "model.json"), str(MODEL / "weights.safetensors")

# Targets that need no slides, by the folder that each works in.
TRAINS = dict.fromkeys(("train", "crossval", "transfer"), RUN.training(config["train"]["name"]))
TRAINS |= {"compare": RUN.training(config["compare"]["name"]), "synthesize": RUN.synthesis(config["synthesis"]["name"])}

# Asked for nothing that needs slides or a model, the run can do without them.
WITHOUT_SLIDES = {*TRAINS, "--lint", "--unlock", "--list-rules", "-l"}
NEEDS_SLIDES = not any(
    word in WITHOUT_SLIDES or {RUN.results / "training", RUN.results / "synthesis"}.intersection(Path(word).parents)
    for word in sys.argv[1:]
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
            from pipeline.classifier import check_classifier  # it needs NumPy

            check_classifier(Path(config["classifier"]), CARD)
        if SLIDES.left_out:
            told = f"slides: {len(SLIDES)} in {config['slides']!r}, left out: {SLIDES.left_out}"
            print(f"{told} (a slide table can name them)", file=sys.stderr)
except PipelineError as error:
    if workflow.is_main_process and NEEDS_SLIDES:
        stop(error)
    SLIDES_ERROR = str(error)

# In the environment as well: where stages note that they have removed a damaged store, and where they find which slides
# could not be read from the start (others that go while the run is at work are not to blame).
os.environ.update({NOTES: str(RUN.damaged), UNREADABLE: str(RUN.unreadable)})

# In the environment, no parameter of any rule: it changes no result, so changing it should rerun nothing.
os.environ.update(ON_BAD_SLIDE=config["on_bad_slide"])

# One run at a time in a results folder, and one of each training. The locks go with this process, however it ends;
# Snakemake's own, which outlives a killed run, is off in the profiles. Jobs know the run by what it wrote into the first.
LOCKS, RESTART = {}, None
if workflow.is_main_process and runs_jobs(sys.argv[1:]) and "so_far" not in sys.argv[1:]:
    PLACES = sorted({TRAINS[word] for word in sys.argv[1:] if word in TRAINS}) or [RUN.results]
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


# How often a job is tried. Jobs of a cluster are told that they will not be tried again, and have this from their
# environment; where it does not reach them, each attempt is the last one. Snakemake knows it when the run starts.
if workflow.is_main_process:
    os.environ.update(JOB_ATTEMPTS="1")


onstart:
    os.environ.update(JOB_ATTEMPTS=str(1 + workflow.execution_settings.retries))
    # Snakemake's own limit of 100 jobs a second, which no run comes near: it makes the scheduler look at all jobs that are
    # ready once a second more with each job that ends, until it keeps a core busy. Others, from a profile, say, stay.
    limit = workflow.scheduling_settings.max_jobs_per_timespan
    if limit is not None and (limit.max_jobs, limit.timespan) == (100, 1):
        workflow.scheduler.job_rate_limiter = None
    if RESTART is not None and SLIDES is not None:
        RUN.unreadable.write_text(
            "".join(f"{slide.name}\n" for slide in SLIDES if not readable(slide.path)), "utf-8"
        )
    # Whoever asked to have things done over would have them done twice.
    told = workflow.dag_settings
    if RESTART is not None and not (
        told.forceall or told.forcetargets or told.forcerun or workflow.overwrite_workdir
    ):
        RESTART.begin()
    # Only for jobs of this machine, in the environment that runs Snakemake.
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
    """How far the run has come and what to do, when it has ended."""
    if RUN.slide_table.is_file():  # else it has not begun
        try:
            print(f"\n{closing_words(RUN.results, bool(ERRORS))}", file=sys.stderr)
        except PipelineError as error:
            print(f"warning: {error}", file=sys.stderr)


# Also where nothing was to be done. A command that starts once more tells at its second end.
if RESTART is not None and SLIDES is not None:
    atexit.register(tell)


wildcard_constraints:
    slide="[^/]+",


BY_FOLDER = {} if SLIDES is None else {folder_name(slide.name): slide for slide in SLIDES}
WITH_REGIONS = any(slide.regions is not None for slide in BY_FOLDER.values())
SLIDES_IN = Counter(slide.path.parent for slide in BY_FOLDER.values())
