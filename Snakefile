# Whole-slide nucleus pipeline: snakemake --cores 8 --config slides=FOLDER results=FOLDER
from snakemake.utils import min_version

min_version("9.18")


configfile: os.path.join(workflow.basedir, "config.yaml")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/jobs.smk"
include: "workflow/rules/slide.smk"
include: "workflow/rules/parts.smk"
include: "workflow/rules/cohort.smk"
include: "workflow/rules/plans.smk"
include: "workflow/rules/train.smk"


localrules:
    all,
    settings,
    slide_table,
    so_far,
    train,
    train_settings,
    synthesize,
    synthesis_settings,
    crossval,
    crossval_table,
    compare,
    compare_table,
    transfer,
    transfer_table,


rule all:
    default_target: True
    input:
        cohort_files(),
        each_slide("nuclei", "nuclei_geojson", "metrics", "overview"),
        each_slide("labels", "labels_zarr") if config["export"]["labels"] else [],
        each_slide("classified", "classified_geojson", "classified_png") if config["classifier"] is not None else [],
        each_slide("regions", "regions_png", having="regions"),
