# Model packages from annotated fields: snakemake train, crossval, compare, transfer.
rule train:
    input:
        package(Path("models") / NAME),


rule crossval:
    input:
        RUN.training(NAME) / "crossval.tsv",
        package(Path("models") / f"{NAME}-cv") if FINAL else [],


rule compare:
    input:
        RUN.training(config["compare"]["name"]) / "compare.tsv" if COMPARED else [],


rule transfer:
    input:
        RUN.training(NAME) / "transfer.tsv" if ARMS else [],


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


# Its checkpoints are no output: Snakemake would remove them, and a training that was stopped could not go on.
rule train_model:
    input:
        settings=str(RUN.training_settings(NAME)),
    output:
        card=whole(Path("models") / NAME / "model.json"),
        weights=whole(Path("models") / NAME / "weights.safetensors"),
        report=whole(RUN.training(NAME) / "report.html"),
    log:
        str(RUN.log("train", NAME)),
    benchmark:
        str(RUN.benchmark("train", NAME))
    conda:
        "../../envs/pipeline.yaml"
    threads: 16
    resources:
        mem_mb=megabytes(16000),
        runtime=minutes(1440),
        gpu=training_gpus,
    params:
        work=lambda wildcards: str(RUN.training(NAME)),
        folder=lambda wildcards, output: os.path.dirname(output.card),
    shell:
        "python -m pipeline train --config-json={input.settings:q} --work={params.work:q} --out={params.folder:q} "
        '--max-minutes="$TRAIN_MAX_MINUTES" --threads={threads} > {log:q} 2>&1'


# One training of a protocol: a fold, an experiment, an arm.
rule train_part:
    input:
        settings=str(RUN.training_settings("{training}")),
        start=start_package,
    output:
        card=whole(RUN.training("{training}") / "model" / "model.json"),
        weights=whole(RUN.training("{training}") / "model" / "weights.safetensors"),
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
        runtime=minutes(1440),
        gpu=training_gpus,
    params:
        work=lambda wildcards: str(RUN.training(wildcards.training)),
        folder=lambda wildcards, output: os.path.dirname(output.card),
        start=start_option,
    shell:
        "python -m pipeline train --config-json={input.settings:q} --work={params.work:q} --out={params.folder:q} "
        '{params.start:q} --max-minutes="$TRAIN_MAX_MINUTES" --threads={threads} > {log:q} 2>&1'


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
        runs=run_options(NAME, FOLDS),
        folder=lambda wildcards, output: os.path.dirname(output.table),
    shell:
        "python -m pipeline training-summary crossval {params.runs:q} --out={params.folder:q} > {log:q} 2>&1"


rule crossval_final:
    input:
        settings=str(RUN.training_settings(f"{NAME}/final")),
        scores=rules.crossval_table.output.summary,
    output:
        card=whole(Path("models") / f"{NAME}-cv" / "model.json"),
        weights=whole(Path("models") / f"{NAME}-cv" / "weights.safetensors"),
    log:
        str(RUN.log("train", f"{NAME}/final")),
    benchmark:
        str(RUN.benchmark("train", f"{NAME}/final"))
    conda:
        "../../envs/pipeline.yaml"
    threads: 16
    resources:
        mem_mb=megabytes(16000),
        runtime=minutes(1440),
        gpu=training_gpus,
    params:
        work=lambda wildcards: str(RUN.training(f"{NAME}/final")),
        folder=lambda wildcards, output: os.path.dirname(output.card),
    shell:
        "python -m pipeline train --config-json={input.settings:q} --work={params.work:q} --out={params.folder:q} "
        '--scores={input.scores:q} --max-minutes="$TRAIN_MAX_MINUTES" --threads={threads} > {log:q} 2>&1'


rule compare_table:
    input:
        evaluations(config["compare"]["name"], COMPARED),
    output:
        table=whole(RUN.training(config["compare"]["name"]) / "compare.tsv"),
        summary=whole(RUN.training(config["compare"]["name"]) / "compare.json"),
        report=whole(RUN.training(config["compare"]["name"]) / "compare.html"),
    log:
        str(RUN.log("train", f"{config['compare']['name']}.compare")),
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(1000),
        runtime=minutes(10),
    params:
        runs=run_options(config["compare"]["name"], COMPARED),
        folder=lambda wildcards, output: os.path.dirname(output.table),
    shell:
        "python -m pipeline training-summary compare {params.runs:q} --out={params.folder:q} > {log:q} 2>&1"


rule transfer_table:
    input:
        evaluations(NAME, ARMS),
    output:
        table=whole(RUN.training(NAME) / "transfer.tsv"),
        summary=whole(RUN.training(NAME) / "transfer.json"),
        report=whole(RUN.training(NAME) / "transfer.html"),
    log:
        str(RUN.log("train", f"{NAME}.transfer")),
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(1000),
        runtime=minutes(10),
    params:
        runs=run_options(NAME, ARMS),
        folder=lambda wildcards, output: os.path.dirname(output.table),
    shell:
        "python -m pipeline training-summary transfer {params.runs:q} --out={params.folder:q} > {log:q} 2>&1"
