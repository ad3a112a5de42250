# Targets that make model packages from annotated fields (train, crossval, compare, transfer), and synthetic fields
# (synthesize).
rule train:
    input:
        mark(Path("models") / NAME),
        RUN.training(NAME) / "report.html",


rule crossval:
    input:
        RUN.training(NAME) / "crossval.tsv",
        [mark(Path("models") / f"{NAME}-cv"), RUN.training(f"{NAME}/final") / "report.html"] if FINAL else [],


rule compare:
    input:
        RUN.training(config["compare"]["name"]) / "compare.tsv" if COMPARED else [],


rule transfer:
    input:
        RUN.training(NAME) / "transfer.tsv" if ARMS else [],


rule synthesize:
    input:
        str(SYNTHETIC),


rule train_settings:
    output:
        settings=whole(RUN.training_settings("{training}")),
    log:
        str(RUN.log("train", "{training}.settings")),
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(1000),
        runtime=minutes(5),
    params:
        settings=lambda wildcards: as_json(SECTIONS[wildcards.training]),
    shell:
        "printf '%s\\n' {params.settings:q} > {output.settings:q} 2> {log:q}"


# One training of a protocol: a fold, an experiment or an arm. Its checkpoints and its package are not outputs, because
# Snakemake would remove them: a stopped training could not resume, and a failed one would leave nothing.
rule train_part:
    input:
        settings=str(RUN.training_settings("{training}")),
        start=start_package,
        synthetic=synthetic_source,
    output:
        package=touch(mark(RUN.training("{training}") / "model")),
        scores=whole(RUN.training("{training}") / "evaluation.json"),
        report=whole(RUN.training("{training}") / "report.html"),
    log:
        str(RUN.log("train", "{training}")),
    benchmark:
        str(RUN.benchmark("train", "{training}"))
    wildcard_constraints:
        training="|".join(map(re.escape, TRAININGS)),
    conda:
        "../../envs/pipeline.yaml"
    threads: 16
    resources:
        mem_mb=megabytes(16000),
        runtime=minutes(1440, by_attempt=False),
        gpu=training_gpus,
    params:
        work=lambda wildcards, output: os.path.dirname(output.report),
        folder=lambda wildcards, output: os.path.dirname(output.package),
        option=start_option,
    shell:
        "python -m pipeline train --config-json={input.settings:q} --work={params.work:q} --out={params.folder:q} "
        '{params.option:q} --max-minutes="$TRAIN_MAX_MINUTES" --threads={threads} > {log:q} 2>&1'


use rule train_part as train_model with:
    output:
        package=touch(mark(Path("models") / "{training}")),
        scores=whole(RUN.training("{training}") / "evaluation.json"),
        report=whole(RUN.training("{training}") / "report.html"),
    wildcard_constraints:
        training=re.escape(NAME),


use rule train_settings as synthesis_settings with:
    output:
        settings=whole(SYNTHETIC.parent / "settings.json"),
    log:
        str(RUN.log("synthesis", f"{config['synthesis']['name']}.settings")),
    params:
        settings=as_json(SYNTHESIS),


# The checkpoint lies beside the folder of the fields, because Snakemake removes that folder when it runs the job again.
rule synthetic_fields:
    input:
        settings=rules.synthesis_settings.output.settings,
    output:
        fields=directory(str(SYNTHETIC)),
    log:
        str(RUN.log("synthesis", config["synthesis"]["name"])),
    benchmark:
        str(RUN.benchmark("synthesis", config["synthesis"]["name"]))
    conda:
        "../../envs/pipeline.yaml"
    threads: 16
    resources:
        mem_mb=megabytes(16000),
        runtime=minutes(1440, by_attempt=False),
        gpu=learning_gpus(config["synthesis"]["device"]),
    params:
        work=lambda wildcards, output: os.path.dirname(output.fields),
    shell:
        "python -m pipeline synthesize --config-json={input.settings:q} --work={params.work:q} --out={output.fields:q} "
        '--max-minutes="$SYNTHESIS_MAX_MINUTES" --threads={threads} > {log:q} 2>&1'


rule crossval_table:
    input:
        evaluations(NAME, FOLDS),
    output:
        table=whole(RUN.training(NAME) / "crossval.tsv"),
        summary=whole(RUN.training(NAME) / "crossval.json"),
        report=whole(RUN.training(NAME) / "crossval.html"),
    log:
        str(RUN.log("train", f"{NAME}.crossval")),
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(1000),
        runtime=minutes(10),
    params:
        kind="crossval",
        runs=run_options(NAME, FOLDS),
        folder=lambda wildcards, output: os.path.dirname(output.table),
    shell:
        "python -m pipeline training-summary {params.kind} {params.runs:q} --out={params.folder:q} > {log:q} 2>&1"


use rule train_part as crossval_final with:
    input:
        settings=str(RUN.training_settings(f"{NAME}/final")),
        scores=rules.crossval_table.output.summary,
    output:
        package=touch(mark(Path("models") / f"{NAME}-cv")),
        report=whole(RUN.training(f"{NAME}/final") / "report.html"),
    log:
        str(RUN.log("train", f"{NAME}/final")),
    benchmark:
        str(RUN.benchmark("train", f"{NAME}/final"))
    params:
        option=lambda wildcards, input: [f"--scores={input.scores}"],


use rule crossval_table as compare_table with:
    input:
        evaluations(config["compare"]["name"], COMPARED),
    output:
        table=whole(RUN.training(config["compare"]["name"]) / "compare.tsv"),
        summary=whole(RUN.training(config["compare"]["name"]) / "compare.json"),
        report=whole(RUN.training(config["compare"]["name"]) / "compare.html"),
    log:
        str(RUN.log("train", f"{config['compare']['name']}.compare")),
    params:
        kind="compare",
        runs=run_options(config["compare"]["name"], COMPARED),


use rule crossval_table as transfer_table with:
    input:
        evaluations(NAME, ARMS),
    output:
        table=whole(RUN.training(NAME) / "transfer.tsv"),
        summary=whole(RUN.training(NAME) / "transfer.json"),
        report=whole(RUN.training(NAME) / "transfer.html"),
    log:
        str(RUN.log("train", f"{NAME}.transfer")),
    params:
        kind="transfer",
        runs=run_options(NAME, ARMS),
