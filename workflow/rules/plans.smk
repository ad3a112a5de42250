# Which trainings there are, and their settings. Parsed again in every cluster job, like common.smk.
import re

from pipeline.training.owner import check_place
from pipeline.training.plan import plan_compare, plan_crossval, plan_synthesis, plan_transfer

NAME = config["train"]["name"]

# In the environment instead of a rule's parameters: the time limit of one job changes no result, as training resumes.
os.environ.update(TRAIN_MAX_MINUTES=str(config["train"]["schedule"].pop("max_minutes") or 0))
os.environ.update(SYNTHESIS_MAX_MINUTES=str(config["synthesis"].pop("max_minutes") or 0))

try:
    FOLDS = plan_crossval(config["train"], config["crossval"])
    FINAL = FOLDS.pop("final", None)
    COMPARED = plan_compare(
        config["compare"],
        [Path("config/experiments"), Path(workflow.basedir, "config/experiments")],
        SCHEMA["properties"]["train"],
        beside,
    )
    if COMPARED and config["compare"]["name"] == NAME:
        raise PipelineError(f"compare.name and train.name are both {NAME!r}", "give one of them another name")
except PipelineError as error:
    stop(error)
try:
    ARMS, NO_ARMS = plan_transfer(config["train"], config["transfer"]), None
except PipelineError as error:  # matters only if the target is transfer
    ARMS, NO_ARMS = {}, str(error)

# Trainings by the name of their folder under RESULTS/training.
TRAININGS = {f"{NAME}/{name}": run for name, run in (FOLDS | ARMS).items()}
TRAININGS |= {f"{config['compare']['name']}/{name}": run for name, run in COMPARED.items()}
SECTIONS = {NAME: config["train"]} | {name: run.settings for name, run in TRAININGS.items()}
if FINAL is not None:
    SECTIONS[f"{NAME}/final"] = FINAL.settings
LIMITED = [name for name, section in SECTIONS.items() if section["schedule"].pop("max_minutes", None)]
for section in SECTIONS.values():
    section.update({role: beside(section[role]) for role in ("start_from", "teacher") if section.get(role)})

# The synthetic fields. They depend on the experiment's training fields, its pixel size and its stain.
SYNTHETIC = RUN.synthesis(config["synthesis"]["name"]) / "fields"


def learns_from_synthetic(section):
    """Whether a training learns from the synthetic fields."""
    return any(Path(one["path"]) == SYNTHETIC for one in section["data"])


SYNTHESIS = plan_synthesis(
    next(filter(learns_from_synthetic, SECTIONS.values()), config["train"]), config["synthesis"], SYNTHETIC
)


wildcard_constraints:
    training="|".join(map(re.escape, SECTIONS)),


def mark(folder):
    """Return the file that tells Snakemake that a training has put its package into a folder.

    The package itself is not an output: Snakemake would remove the previous package before the new one exists.
    """
    return str(Path(folder) / ".trained")


def training_gpus(wildcards):
    """Return the number of GPUs for a training, as its settings state it."""
    schedule = SECTIONS[getattr(wildcards, "training", NAME)]["schedule"]
    return schedule["devices"] * learning_gpus(schedule["device"])


def start_package(wildcards):
    """Return the mark (see `mark`) of the training of the same protocol that this one starts from, if there is one."""
    run = TRAININGS.get(wildcards.training)
    start = run and run.start
    return [mark(RUN.training(wildcards.training).parent / start / "model")] if start else []


def start_option(wildcards, input):
    """Return the option that names the model package that a training starts from, if there is one."""
    return [f"--start-from={os.path.dirname(input.start[0])}"] if input.start else []


def synthetic_source(wildcards):
    """Return the folder of the synthetic fields, if a training learns from them."""
    return [str(SYNTHETIC)] if learns_from_synthetic(SECTIONS[getattr(wildcards, "training", NAME)]) else []


def run_options(group, names):
    """Return the options that name the folders of a protocol's trainings."""
    return [f"--run={name}={RUN.training(f'{group}/{name}')}" for name in names]


def evaluations(group, names):
    """Return the files with the scores of a protocol's trainings."""
    return [str(RUN.training(f"{group}/{name}") / "evaluation.json") for name in names]


# By target, the folder of the model package that a user gets, and the working folder of its training.
PACKAGES = {"train": (Path("models") / NAME, RUN.training(NAME))}
if FINAL is not None:
    PACKAGES["crossval"] = (Path("models") / f"{NAME}-cv", RUN.training(f"{NAME}/final"))

# The page to look at after a run, by target.
PAGES = {
    "train": RUN.training(NAME) / "report.html",
    "crossval": RUN.training(NAME) / "crossval.html",
    "transfer": RUN.training(NAME) / "transfer.html",
    "compare": RUN.training(config["compare"]["name"]) / "compare.html",
    "synthesize": SYNTHETIC / "sheet.png",
}


onsuccess:
    for target, page in PAGES.items():
        if target in TARGETS:
            if target in PACKAGES:
                print(
                    f"\nmodel: {PACKAGES[target][0]}, in runs --config model={PACKAGES[target][0]}", file=sys.stderr
                )
            print(f"look at: {os.path.abspath(page)}", file=sys.stderr)


# Settings to check beyond the schema before anything runs, e.g. whether a network knows its heads and its arguments.
CHECKED = {target: [config["train"]] for target in ("train", "crossval", "transfer")}
CHECKED["compare"] = [run.settings for run in COMPARED.values()]

NOTHING = {
    "compare": None if COMPARED else "compare: no experiments (list them in the setting compare.experiments)",
    "transfer": NO_ARMS,
}
if workflow.is_main_process:
    for target, reason in NOTHING.items():
        if reason and target in TARGETS:
            stop(reason)
    for name in LIMITED:
        group, one = os.path.split(name)
        if ("transfer" in TARGETS and group == NAME and one in ARMS) or ("compare" in TARGETS and one in COMPARED):
            told = f"{name}: schedule.max_minutes is a limit of each training of a command"
            stop(f"{told} (set it for all: --config 'train={{schedule: {{max_minutes: N}}}}')")
    try:
        for target, (folder, work) in PACKAGES.items():
            if target in TARGETS:
                check_place(folder, work)
                if NEEDS_SLIDES and MODEL.absolute() == folder.absolute():
                    stop(
                        f"{target}: it writes {folder}, the model of the slides (train first, in a command of its own)"
                    )
        for section in [section for target in CHECKED if target in TARGETS for section in CHECKED[target]]:
            from pipeline.training.experiment import Experiment, check_parts

            check_parts(Experiment.from_json(section))
    except PipelineError as error:
        stop(error)
