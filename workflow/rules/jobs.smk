# Functions that the rules use: inputs, parameters and resources of a job.
import time

STARTED = time.time()


def known(function):
    """Store a function's signature on the function: Snakemake inspects it at every use, several times per job."""
    function.__signature__ = inspect.signature(function)
    return function


def slides():
    """Return the slides of the run."""
    if SLIDES is None:
        raise WorkflowError(SLIDES_ERROR)
    return SLIDES


def entry(wildcards):
    """Return the slide table's entry for the slide of a job."""
    slides()
    return BY_FOLDER[wildcards.slide]


@known
def slide_path(wildcards):
    """Path of a job's slide."""
    return str(entry(wildcards).path)


@known
def slide_name(wildcards):
    """Name of a job's slide."""
    return entry(wildcards).name


def input_files(path):
    """Return `path` as a list of inputs, which is empty if Snakemake cannot use it as one.

    Left out are files that

    - are missing or unreadable: their slide fails, and the run goes on;
    - have braces or angle brackets in their path: Snakemake would read them as wildcards and variables;
    - have a modification time after the start of the run, as from a file server whose clock is ahead: outputs must be
      newer than inputs, so the job would fail.
    """
    text = str(path)
    return [text] if not set("{<") & set(text) and readable(text) and os.path.getmtime(text) <= STARTED else []


@known
def slide_file(wildcards):
    """Return the file of a job's slide as an input, see `input_files`."""
    return input_files(entry(wildcards).path)


@functools.cache
def stamp(path):
    """Return a stamp that changes when a file is replaced, even by an older one: copies often keep their dates.

    It covers the content and, for a file that cannot be an input (see `input_files`), the modification time. Snakemake
    itself checks the times of inputs, and ignores a new time if the content is the same.
    """
    if path is None or not path.is_file():
        return None
    try:
        return content_stamp(path) + ([] if input_files(path) else [path.stat().st_mtime_ns])
    except OSError:  # the stage that reads the file reports it
        return None


@known
def slide_stamp(wildcards):
    """`stamp` of the file of a job's slide."""
    return stamp(entry(wildcards).path)


def extra_file(column):
    """Return an input function for the file that a column of the slide table names for the slide, if there is one."""

    @known
    def files(wildcards):
        path = getattr(entry(wildcards), column)
        return [] if path is None else input_files(path)

    return files


def extra_stamp(column):
    """Return a parameter function for the `stamp` of the file in this column of the slide table."""

    @known
    def of_file(wildcards):
        return stamp(getattr(entry(wildcards), column))

    return of_file


def option(flag, value):
    """Return a command's option as a list, which is empty if the option has no value."""
    return [] if value is None else [f"{flag}={value}"]


def extra_option(column, flag):
    """Return a parameter function for the options with the file in this column and the origin of its coordinates."""

    @known
    def named(wildcards):
        given = option(flag, getattr(entry(wildcards), column))
        # Coordinates count from the same corner as in the files for QuPath. The default is left out.
        return [*given, "--origin=bounds"] if given and config["export"]["origin"] == "bounds" else given

    return named


@known
def settings_known(wildcards):
    """Return no inputs; stop if settings or slides differ from those of the results and Snakemake cannot notice it.

    Snakemake keeps its records in the working directory, by the path of the results. Without them it would not notice
    added or removed slides either, so an outdated slide table is rewritten before Snakemake looks at it.
    """
    try:
        # Slides and a training in one command: a file of the slides was named, and only the training's folder is locked.
        if workflow.is_main_process and runs_jobs(sys.argv[1:]) and RUN.results not in LOCKS:
            LOCKS[RUN.results] = lock_run(RUN.results)
        if (
            workflow.is_main_process
            and RUN.settings.is_file()
            and workflow.persistence.metadata(rules.settings.output.settings) is None
            and not workflow.dag_settings.forceall
            and "--report" not in sys.argv[1:]
        ):
            check_same_results(RUN.settings, config)
            check_same_slides(slides(), RUN)
        if RESTART is not None:
            renew_table(slides(), RUN.slide_table)
    except (OSError, PipelineError) as error:
        atexit.unregister(tell)
        stop(error)
    return []


@functools.cache
def gone():
    """Return the finished slides whose files cannot be read now, see `out_of_reach`.

    Snakemake would process them again, and failures about missing files would replace their results.
    """
    return out_of_reach(slides(), RUN)


def each_slide(*kinds, having="path"):
    """Return an input function for these outputs of every slide with a value in column `having` that is not `gone`."""

    @known
    def files(wildcards):
        chosen = [slide for slide in slides() if getattr(slide, having) is not None and slide.name not in gone()]
        return [str(getattr(RUN.slide(slide.name), kind)) for slide in chosen for kind in kinds]

    return files


def cohort_files():
    """Return the output files of the run as a whole."""
    own = [str(path) for path in (RUN.cohort_tsv, RUN.cohort_parquet, RUN.failed, RUN.report, RUN.manifest)]
    return own + region_tables()


def region_tables():
    """Return the run's tables of regions, if any slide has regions."""
    return [str(path) for path in (RUN.regions_tsv, RUN.regions_parquet)] if WITH_REGIONS else []


def store(path):
    """Return the output for a store: beside the results, or in this run's own folder below the setting `scratch`."""
    if config["scratch"] is None:
        return directory(str(path))
    run = hashlib.sha256(os.path.abspath(RUN.results).encode()).hexdigest()[:12]
    return directory(str(Path(config["scratch"], f"nuclei-{run}") / path.relative_to(RUN.results)))


def passing(path, keep):
    """Mark a store to be removed once all jobs that read it are done, unless the settings keep it."""
    return path if keep else temp(path)


if workflow.is_main_process and NEEDS_SLIDES and SLIDES is not None:
    try:
        if gone():
            which = some([f"{name} ({path})" for name, path in gone().items()])
            told = f"slides: {len(gone())} of the finished ones have files that cannot be read now: {which}"
            hint = "check that the folder is mounted and the path is right, or take them out of the slides"
            if RUN.settings.is_file():
                try:
                    check_same_results(RUN.settings, config)
                except PipelineError as error:
                    raise PipelineError(f"{told}; and {error.reason.removeprefix('results: ')}", hint) from None
            print(f"warning: {told}; they keep their results ({hint})", file=sys.stderr)
    except PipelineError as error:
        stop(error)


def passing_stores(folder):
    """Return the stores of a slide that are to be removed once they have been read, with their stages' manifests."""
    made = (
        ("tiles", store(folder.tiles_zarr), folder.tiles),
        ("infer", store(folder.maps_zarr), folder.maps),
        ("instances", folder.instances_parquet, folder.instances),
    )
    return {Path(path): manifest for stage, path, manifest in made if not config[stage]["keep"]}


# If a run was killed, or its file server failed, while it removed a temporary store, some of the store is left.
if RESTART is not None and SLIDES is not None:
    try:
        for folder in map(RUN.folder, BY_FOLDER):
            for path, made in passing_stores(folder).items():
                clear_remains(path, made)
            for part in folder.parts():
                clear_remains(part, Path(f"{part}.json"))
    except (OSError, PipelineError) as error:
        stop(error)


def clear_passing():
    """Remove the temporary stores of slides that this run has finished.

    Snakemake removes a store when the last job that reads it ends, and never if a run is killed just then.
    """
    if workflow.storage_settings.notemp:
        return
    asked = workflow.dag_settings.targets
    for folder in map(RUN.folder, BY_FOLDER):
        stores = {path: made for path, made in passing_stores(folder).items() if str(path) not in asked}
        last = [folder.metrics, folder.overview]
        last += [folder.labels] if config["export"]["labels"] else []
        last += [folder.classify] if config["classifier"] is not None else []
        try:
            clear_finished(stores, last, STARTED)
        except OSError as error:
            print(f"warning: {folder.root}: a temporary store was not removed: {error}", file=sys.stderr)


def whole(path):
    """Return a file as an output that must not be empty."""
    return ensure(str(path), non_empty=True)


@functools.cache
def gigabytes(folder):
    """Total size in GB of the files of the slide with this results folder, 0 if they are missing."""
    path = BY_FOLDER[folder].path
    return slide_bytes(path, alone=SLIDES_IN[path.parent] == 1) / 1e9


def growing(base, by_size, joined):
    """Return a function for an amount that grows with the slide: `base` plus `by_size` for each GB of its files.

    `joined` is the pair (base, by_size) for a job that joins the parts of a huge slide.
    """

    def amount(wildcards):
        first, each = joined if joined and in_parts(wildcards) else (base, by_size)
        return first + each * gigabytes(wildcards.slide) if each else first

    return amount


def megabytes(base, by_size=0, joined=None):
    """Return a resource function for memory in MB, multiplied by the number of the attempt; see `growing`.

    In a cluster job, Snakemake's own processes take 250 MB of it. Only the cluster's profile sets retries, so elsewhere
    the first attempt is the only one.
    """
    amount = growing(base, by_size, joined)

    @known
    def memory(wildcards, attempt):
        return round(amount(wildcards) * attempt)

    return memory


def minutes(base, by_size=0, joined=None, *, by_attempt=True):
    """Return a resource function for the time limit in minutes, multiplied by the number of the attempt; see `growing`.

    It is at most the settings' limit for a cluster job. The stages of a group run one after another in one such job, so
    each gets an equal share of that limit.
    """
    amount = growing(base, by_size, joined)

    @known
    def time(wildcards, attempt, rulename):
        limit = max(1, config["cluster"]["max_minutes"] // stages_in_a_row(rulename))
        return min(limit, round(amount(wildcards) * (attempt if by_attempt else 1)))

    return time


@functools.cache
def stages_in_a_row(stage):
    """Return how many stages run one after another in the cluster job that runs this one."""
    groups = workflow.group_settings.overwrite_groups
    if stage not in groups:
        return 1
    return sum(group == groups[stage] and name not in OPTIONAL_STAGES for name, group in groups.items())


@known
def number_of_attempt(wildcards, attempt):
    """Return the number of a job's attempt. Stages blame the slide only after the last one; see `JOB_ATTEMPTS`."""
    return attempt


def is_small(folder):
    """Whether the slide with this results folder is so small that a stage takes longer to start than to run."""
    return gigabytes(folder) < 0.005


def threads_of(rule_threads, *, long=False, joins=False):
    """Return a function for a job's threads: one if the slide is small, or if the job `joins` the parts of a huge one.

    A `long` stage of a small slide is limited to one thread only if there are enough slides to keep all cores busy.
    """

    @known
    def number(wildcards):
        cores = workflow.resource_settings.cores if workflow.is_main_process else None  # a cluster job has its own
        crowded = not long or (isinstance(cores, int) and len(slides()) >= 2 * cores)
        single = (crowded and is_small(wildcards.slide)) or (joins and in_parts(wildcards))
        return 1 if single else rule_threads

    return number


@known
def mpp_options(wildcards):
    """Return the options for the pixel size. The slide table takes precedence over the settings."""
    stated = entry(wildcards).mpp
    if stated is not None:
        return [f"--mpp={stated}", "--mpp-source=table"]
    return [] if config["mpp"] is None else [f"--mpp={config['mpp']}", "--mpp-source=config"]


def own_gpus(device):
    """Return the number of GPUs for a job on this machine: 1 if there is a GPU and the settings allow it, else 0.

    The default profile runs one GPU job at a time; a cluster's profile sets its own number of GPUs.
    """
    return int(device != "cpu" and bool(present()))


def learning_gpus(device):
    """Return the number of GPUs for a training process: 1 on a cluster, and on this machine if it has a GPU, else 0."""
    return int(workflow.non_local_exec and device != "cpu") or own_gpus(device)


@functools.cache
def mapping_gpus():
    """Return the number of GPUs for a job that computes maps: 0 if the model has no network, else as `own_gpus`."""
    try:
        network = json.loads(Path(MODEL_CARD).read_text(encoding="utf-8"))["network"]["name"]
    except (OSError, ValueError, KeyError, TypeError):  # refused elsewhere
        return 0
    return own_gpus(config["infer"]["device"]) if needs_torch(network) else 0


@known
def inference_gpus(wildcards):
    """Return the number of GPUs for inference on a whole slide: 0 if the job only joins parts, else as `mapping_gpus`."""
    return 0 if in_parts(wildcards) else mapping_gpus()


@known
def model_folder(wildcards, input):
    """Return the folder of a job's model package."""
    return os.path.dirname(input.model)


@functools.cache
def card_digest():
    """SHA-256 of the model's card. It takes no `input`: Snakemake does not compare such parameters between runs."""
    return file_sha256(Path(MODEL_CARD))


def classifier_digest():
    """SHA-256 of the classifier, None if none is set. Dates are not enough: a copy often keeps them."""
    path = config["classifier"]
    return file_sha256(Path(path)) if path is not None and Path(path).is_file() else None


def as_json(value):
    """Return settings as one line of JSON."""
    return json.dumps(value, sort_keys=True)


@known
def in_parts(wildcards):
    """Whether a job's slide is large enough to be processed in parts."""
    least, path = config["parts"]["from_gb"], entry(wildcards).path
    return least is not None and path.is_file() and gigabytes(wildcards.slide) >= least


PARTS = config["parts"]["count"]


def check_groups(stage):
    """Stop if a group of the profile has both a stage and an earlier one: the stage's parts must run between them."""
    groups = workflow.group_settings.overwrite_groups
    group = groups.get(stage)
    earlier = [name for name in STAGES[: STAGES.index(stage)] if groups.get(name) == group]
    if group is not None and earlier and groups.get(f"{stage}_part") != group:
        stop(
            f"parts: {stage} is in one group with {' and '.join(earlier)}, its parts have to run in between "
            f"(give it a group of its own in the profile: {stage}=NAME)"
        )


def part_files(stage):
    """Return an input function for the stores of all parts of a stage, if the slide is processed in parts."""

    def files(wildcards):
        if not in_parts(wildcards):
            return []
        check_groups(stage)
        folder = RUN.folder(wildcards.slide)
        return [str(folder.part(stage, f"{number}-of-{PARTS}")) for number in range(1, PARTS + 1)]

    return files


def part_manifests(stage):
    """Return an input function for the manifests of all parts of a stage, if the slide is processed in parts."""

    def files(wildcards):
        return [f"{path}.json" for path in part_files(stage)(wildcards)]

    return files


def parts_option(wildcards, input):
    """Return the option that names the parts that a job joins, if there are any."""
    return ["--parts", *input.parts] if input.parts else []


def part_option(wildcards):
    """Return the option for the part that a job processes."""
    return [f"--part={wildcards.part.replace('-of-', '/')}"]


def part_outputs(stage):
    """Return the manifest and the store of a part. Both are removed once the parts are joined."""
    store = str(ONE.part(stage, "{part}"))
    return temp(whole(f"{store}.json")), temp(directory(store))
