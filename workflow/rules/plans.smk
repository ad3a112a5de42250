# Which trainings there are, and their settings. Parsed again in every cluster job, like common.smk.
import re

from pipeline.training.owner import check_place
from pipeline.training.plan import plan_compare, plan_crossval, plan_synthesis, plan_transfer

NAME = config["train"]["name"]

# In the environment, no parameter of any rule: when to stop for the time being changes no result.
os.environ.update(TRAIN_MAX_MINUTES=str(config["train"]["schedule"].pop("max_minutes") or 0))
os.environ.update(SYNTHESIS_MAX_MINUTES=str(config["synthesis"].pop("max_minutes") or 0))

try:
    FOLDS = plan_crossval(config["train"], config["crossval"])
    FINAL = FOLDS.pop("final", None)
    COMPARED = plan_compare(
        config["compare"],
        [Path("config/experiments"), Path(workflow.basedir, "config/experiments")],
        SCHEMA["properties"]["train"],
    )
    if COMPARED and config["compare"]["name"] == NAME:
        raise PipelineError(f"compare.name and train.name are both {NAME!r}", "give one of them another name")
except PipelineError as error:
    stop(error)
try:
    ARMS, NO_ARMS = plan_transfer(config["train"], config["transfer"]), None
except PipelineError as error:  # no matter to those who ask for something else
    ARMS, NO_ARMS = {}, str(error)

# Trainings by the name of their folder under RESULTS/training.
TRAININGS = {f"{NAME}/{name}": run for name, run in (FOLDS | ARMS).items()}
TRAININGS |= {f"{config['compare']['name']}/{name}": run for name, run in COMPARED.items()}
SECTIONS = {NAME: config["train"]} | {name: run.settings for name, run in TRAININGS.items()}
if FINAL is not None:
    SECTIONS[f"{NAME}/final"] = FINAL.settings
for section in SECTIONS.values():
    section["schedule"].pop("max_minutes", None)
    section.update({role: beside(section[role]) for role in ("start_from", "teacher") if section.get(role)})

# Synthetic fields, and what they depend on: which fields are for training, at which pixel size, in which stain.
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
    """The file that tells Snakemake that a training has put its package into a folder.

    The package itself is not an output: Snakemake would remove the one before, before the new one is there.
    """
    return str(Path(folder) / ".trained")


def training_gpus(wildcards):
    """GPUs for a training: as many as its settings say."""
    schedule = SECTIONS[getattr(wildcards, "training", NAME)]["schedule"]
    return schedule["devices"] * learning_gpus(schedule["device"])


def start_package(wildcards):
    """The training that one of a protocol starts from, where it does."""
    run = TRAININGS.get(wildcards.training)
    start = run and run.start
    return [mark(RUN.training(wildcards.training).parent / start / "model")] if start else []


def start_option(wildcards, input):
    """The option that names its model."""
    return [f"--start-from={os.path.dirname(input.start[0])}"] if input.start else []


def synthetic_source(wildcards):
    """The synthetic fields, where a training learns from them."""
    return [str(SYNTHETIC)] if learns_from_synthetic(SECTIONS[getattr(wildcards, "training", NAME)]) else []


def run_options(group, names):
    """Options that name the folders of a protocol's trainings."""
    return [f"--run={name}={RUN.training(f'{group}/{name}')}" for name in names]


def evaluations(group, names):
    """Scores of a protocol's trainings."""
    return [str(RUN.training(f"{group}/{name}") / "evaluation.json") for name in names]


# Where the packages of trainings go that are not part of a protocol, and the trainings.
PACKAGES = {"train": (Path("models") / NAME, RUN.training(NAME))}
if FINAL is not None:
    PACKAGES["crossval"] = (Path("models") / f"{NAME}-cv", RUN.training(f"{NAME}/final"))

# What to look at, by target.
PAGES = {
    "train": RUN.training(NAME) / "report.html",
    "crossval": RUN.training(NAME) / "crossval.html",
    "transfer": RUN.training(NAME) / "transfer.html",
    "compare": RUN.training(config["compare"]["name"]) / "compare.html",
    "synthesize": SYNTHETIC / "sheet.png",
}


onsuccess:
    for target, page in PAGES.items():
        if target in sys.argv[1:]:
            if target in PACKAGES:
                print(
                    f"\nmodel: {PACKAGES[target][0]}, in runs --config model={PACKAGES[target][0]}", file=sys.stderr
                )
            print(f"look at: {os.path.abspath(page)}", file=sys.stderr)


# What the schema cannot tell before anything runs, as whether a network knows its heads and its arguments.
CHECKED = {target: [config["train"]] for target in ("train", "crossval", "transfer")}
CHECKED["compare"] = [run.settings for run in COMPARED.values()]

NOTHING = {
    "compare": None if COMPARED else "compare: no experiments (list them in the setting compare.experiments)",
    "transfer": NO_ARMS,
}
if workflow.is_main_process:
    for target, reason in NOTHING.items():
        if reason and target in sys.argv[1:]:
            stop(reason)
    try:
        for target, (folder, work) in PACKAGES.items():
            if target in sys.argv[1:]:
                check_place(folder, work)
        for section in [section for target in CHECKED if target in sys.argv[1:] for section in CHECKED[target]]:
            from pipeline.training.experiment import Experiment, check_parts

            check_parts(Experiment.from_json(section))
    except PipelineError as error:
        stop(error)
