# What the rules ask for: inputs, parameters and resources of a job.
import time

STARTED = time.time()


def known(function):
    """Keep a function's signature beside it: Snakemake asks for it at every use, several times a job."""
    function.__signature__ = inspect.signature(function)
    return function


def slides():
    """The slides of the run."""
    if SLIDES is None:
        raise WorkflowError(SLIDES_ERROR)
    return SLIDES


def entry(wildcards):
    """The slide of a job."""
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
    """`path` as an input, where it can be one.

    A file that is missing or may not be read is none: its slide fails, the run goes on. Nor can a path with braces or
    angle brackets be one: Snakemake would look for wildcards and variables in it. Nor one whose time is still to come, as
    from a file server whose clock is ahead: outputs have to be newer, and the job would fail.
    """
    text = str(path)
    return [text] if not set("{<") & set(text) and readable(text) and os.path.getmtime(text) <= STARTED else []


@known
def slide_file(wildcards):
    """The slide's file."""
    return input_files(entry(wildcards).path)


@functools.cache
def stamp(path):
    """What tells a file from another one in its place: Snakemake notices a newer one, but copies often keep their dates.

    Its content's, and its time as well where it cannot be an input; Snakemake overlooks a new time where the content is the
    same.
    """
    if path is None or not path.is_file():
        return None
    try:
        return content_stamp(path) + ([] if input_files(path) else [path.stat().st_mtime_ns])
    except OSError:  # its stage tells
        return None


@known
def slide_stamp(wildcards):
    """`stamp` of the slide's file."""
    return stamp(entry(wildcards).path)


def extra_file(column):
    """Input function for a further file of the slide table, where there is one."""

    @known
    def files(wildcards):
        path = getattr(entry(wildcards), column)
        return [] if path is None else input_files(path)

    return files


def extra_stamp(column):
    """Parameter function for the `stamp` of that file."""

    @known
    def of_file(wildcards):
        return stamp(getattr(entry(wildcards), column))

    return of_file


def option(flag, value):
    """An option of a command, where it has a value."""
    return [] if value is None else [f"{flag}={value}"]


def extra_option(column, flag):
    """Parameter function for the option that names a further file of the slide table, and from where it counts."""

    @known
    def named(wildcards):
        given = option(flag, getattr(entry(wildcards), column))
        # As in the files for QuPath; said only where it is not the usual.
        return [*given, "--origin=bounds"] if given and config["export"]["origin"] == "bounds" else given

    return named


@known
def settings_known(wildcards):
    """No input, but an end where settings or slides differ from those of the results, and Snakemake would not see it.

    Its records are in the working directory, by the path that the results had. Where it has none, nor would it see that
    slides came or went: the table is written again before it looks at it.
    """
    try:
        # Slides together with something else, as snakemake all train.
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
    """`out_of_reach` of this run: Snakemake would begin them again, and what would be left is that files are missing."""
    return out_of_reach(slides(), RUN)


def each_slide(*kinds, having="path"):
    """Input function for these outputs of every slide that has this column of the slide table and is not `gone`."""

    # Names may hold braces: paths from a function are taken as they are.
    @known
    def files(wildcards):
        chosen = [slide for slide in slides() if getattr(slide, having) is not None and slide.name not in gone()]
        return [str(getattr(RUN.slide(slide.name), kind)) for slide in chosen for kind in kinds]

    return files


def cohort_files():
    """Outputs for the run as a whole."""
    own = [str(path) for path in (RUN.cohort_tsv, RUN.cohort_parquet, RUN.failed, RUN.report, RUN.manifest)]
    return own + region_tables()


def region_tables():
    """Those of regions, where slides have any."""
    return [str(path) for path in (RUN.regions_tsv, RUN.regions_parquet)] if WITH_REGIONS else []


def store(path):
    """Where a store goes: beside the results, or below the settings' scratch folder, in a folder of this run's."""
    if config["scratch"] is None:
        return directory(str(path))
    run = hashlib.sha256(os.path.abspath(RUN.results).encode()).hexdigest()[:12]
    return directory(str(Path(config["scratch"], f"nuclei-{run}") / path.relative_to(RUN.results)))


def passing(path, keep):
    """A store that goes away when its readers are done, unless the settings keep it."""
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

# A run that was killed, or whose file server refused, while it removed a store that goes away leaves some of it.
if RESTART is not None and SLIDES is not None:
    try:
        for folder in map(RUN.folder, BY_FOLDER):
            for path, made, keep in (
                (folder.tiles_zarr, folder.tiles, config["tiles"]["keep"]),
                (folder.maps_zarr, folder.maps, config["infer"]["keep"]),
            ):
                if not keep:
                    clear_remains(Path(store(path)), made)
            for part in folder.parts():
                clear_remains(part, Path(f"{part}.json"))
    except (OSError, PipelineError) as error:
        stop(error)


def whole(path):
    """A file that may not be empty."""
    return ensure(str(path), non_empty=True)


@functools.cache
def gigabytes(folder):
    """Size of a slide's files by its results folder, 0 where they are missing."""
    path = BY_FOLDER[folder].path
    return slide_bytes(path, alone=SLIDES_IN[path.parent] == 1) / 1e9


def growing(base, by_size, joined):
    """Amount of a job by its slide: so much for any, so much for each GB of its files.

    `joined` has the same two numbers for a job that puts the parts of a huge slide together.
    """

    def amount(wildcards):
        first, each = joined if joined and in_parts(wildcards) else (base, by_size)
        return first + each * gigabytes(wildcards.slide) if each else first

    return amount


def megabytes(base, by_size=0, joined=None):
    """Memory in MB, again as much with each attempt. Of it, Snakemake's own processes take 250 in a cluster job.

    Attempts are counted by the cluster's profile alone, which sets the retries.
    """
    amount = growing(base, by_size, joined)

    @known
    def memory(wildcards, attempt):
        return round(amount(wildcards) * attempt)

    return memory


def minutes(base, by_size=0, joined=None, *, by_attempt=True):
    """Time limit in minutes, again as much with each attempt, up to the settings' limit for a job of the cluster.

    The stages of a group run one after another: each has its share of that limit.
    """
    amount = growing(base, by_size, joined)

    @known
    def time(wildcards, attempt, rulename):
        limit = max(1, config["cluster"]["max_minutes"] // stages_in_a_row(rulename))
        return min(limit, round(amount(wildcards) * (attempt if by_attempt else 1)))

    return time


@functools.cache
def stages_in_a_row(stage):
    """How many stages a cluster job does one after another, by one of them."""
    groups = workflow.group_settings.overwrite_groups
    if stage not in groups:
        return 1
    return sum(group == groups[stage] and name not in OPTIONAL_STAGES for name, group in groups.items())


@known
def number_of_attempt(wildcards, attempt):
    """Which attempt of a job it is, for stages that blame the slide after the last one only; see `JOB_ATTEMPTS`."""
    return attempt


def is_small(folder):
    """Whether the start of a stage takes longer than its work, of the slide with this results folder."""
    return gigabytes(folder) < 0.005


def threads_of(rule_threads, *, long=False, joins=False):
    """Threads of a rule's jobs: one for a small slide, and one where it `joins` the parts of a huge one.

    A `long` stage of a small slide runs on one thread only where there are slides enough to keep the cores busy.
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
    """Options for the pixel size: the slide table's comes before the settings'."""
    stated = entry(wildcards).mpp
    if stated is not None:
        return [f"--mpp={stated}", "--mpp-source=table"]
    return [] if config["mpp"] is None else [f"--mpp={config['mpp']}", "--mpp-source=config"]


def own_gpus(device):
    """GPUs for a job on this machine: one, where there is any and the settings allow it.

    The default profile lends one at a time; a cluster's profile asks for its own.
    """
    return int(device != "cpu" and bool(present()))


def learning_gpus(device):
    """GPUs for a process that learns: one on a cluster, and on this machine where it has any."""
    return int(workflow.non_local_exec and device != "cpu") or own_gpus(device)


@known
def inference_gpus(wildcards):
    """The same for inference on a whole slide: none where its parts are joined."""
    return 0 if in_parts(wildcards) else own_gpus(config["infer"]["device"])


@known
def model_folder(wildcards, input):
    """The model package of a job."""
    return os.path.dirname(input.model)


@functools.cache
def card_digest():
    """SHA-256 of the model's card. Not by `input`: what is made of that is not compared with the last run."""
    return file_sha256(Path(MODEL_CARD))


def classifier_digest():
    """SHA-256 of the classifier, None where none is set: a copy often keeps its date."""
    path = config["classifier"]
    return file_sha256(Path(path)) if path is not None and Path(path).is_file() else None


def as_json(value):
    """Settings as one line of JSON."""
    return json.dumps(value, sort_keys=True)


@known
def in_parts(wildcards):
    """Whether a job's slide is large enough to be taken in parts."""
    least, path = config["parts"]["from_gb"], entry(wildcards).path
    return least is not None and path.is_file() and gigabytes(wildcards.slide) >= least


PARTS = config["parts"]["count"]


def check_groups(stage):
    """End where a group of the profile holds a stage and an earlier one: the stage's parts come between them."""
    groups = workflow.group_settings.overwrite_groups
    group = groups.get(stage)
    earlier = [name for name in STAGES[: STAGES.index(stage)] if groups.get(name) == group]
    if group is not None and earlier and groups.get(f"{stage}_part") != group:
        stop(
            f"parts: {stage} is in one group with {' and '.join(earlier)}, its parts have to run in between "
            f"(give it a group of its own in the profile: {stage}=NAME)"
        )


def part_files(stage):
    """Input function for the stores of all parts of a stage, where the slide is taken in parts."""

    def files(wildcards):
        if not in_parts(wildcards):
            return []
        check_groups(stage)
        folder = RUN.folder(wildcards.slide)
        return [str(folder.part(stage, f"{number}-of-{PARTS}")) for number in range(1, PARTS + 1)]

    return files


def part_manifests(stage):
    """Input function for their manifests."""

    def files(wildcards):
        return [f"{path}.json" for path in part_files(stage)(wildcards)]

    return files


def parts_option(wildcards, input):
    """Option that names the parts, where there are any."""
    return ["--parts", *input.parts] if input.parts else []


def part_option(wildcards):
    """Option for the part that a job does."""
    return [f"--part={wildcards.part.replace('-of-', '/')}"]


def part_outputs(stage):
    """Manifest and store of a part; both go away when the parts have been put together."""
    store = str(ONE.part(stage, "{part}"))
    return temp(whole(f"{store}.json")), temp(directory(store))
