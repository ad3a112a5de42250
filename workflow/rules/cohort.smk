# The run as a whole: its slide table, its settings, and the tables and report of all slides.


rule slide_table:
    output:
        table=whole(RUN.slide_table),
    log:
        str(RUN.log("cohort", "slides")),
    priority: 1  # first: `python -m pipeline status` reads it
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(1000),
        runtime=minutes(10),
    params:
        slides=lambda wildcards: config["slides"],
        digest=SLIDES.digest if SLIDES is not None else "",
    shell:
        "python -m pipeline slide-table --slides={params.slides:q} --out={output.table:q} > {log:q} 2>&1"


rule settings:
    input:
        settings_known,
    output:
        settings=whole(RUN.settings),
    log:
        str(RUN.log("cohort", "settings")),
    priority: 1  # early: if a run is broken off, its results were made with these settings
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(1000),
        runtime=minutes(5),
    params:
        settings=lambda wildcards: as_json({key: value for key, value in config.items() if key != "train"}),
    shell:
        "printf '%s\\n' {params.settings:q} > {output.settings:q}.part 2> {log:q} "
        "&& mv {output.settings:q}.part {output.settings:q} 2>> {log:q}"


rule cohort:
    input:
        slides=rules.slide_table.output.table,
        settings=rules.settings.output.settings,
        model=MODEL_CARD,
        metrics=each_slide("metrics", "overview"),
        classes=each_slide("classify") if config["classifier"] is not None else [],
        regions=each_slide("regions", having="regions"),
    output:
        tsv=whole(RUN.cohort_tsv),
        parquet=whole(RUN.cohort_parquet),
        failed=whole(RUN.failed),
        report=report(whole(RUN.report), caption="../report/cohort.rst", category="Cohort"),
        manifest=whole(RUN.manifest),
        regions=[whole(path) for path in region_tables()],
    log:
        str(RUN.log("cohort", "cohort")),
    benchmark:
        str(RUN.benchmark("cohort", "cohort"))
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(2000 + 2 * len(BY_FOLDER)),
        runtime=minutes(30 + len(BY_FOLDER) // 50),
    params:
        results=lambda wildcards: config["results"],
        model=model_folder,
        regions_tsv=str(RUN.regions_tsv),
        regions_parquet=str(RUN.regions_parquet),
    shell:
        "python -m pipeline cohort --results={params.results:q} --slides={input.slides:q} "
        "--config-json={input.settings:q} --model={params.model:q} "
        "--out-tsv={output.tsv:q} --out-parquet={output.parquet:q} --out-failed={output.failed:q} "
        "--out-report={output.report:q} --out-manifest={output.manifest:q} "
        "--out-regions-tsv={params.regions_tsv:q} --out-regions-parquet={params.regions_parquet:q} > {log:q} 2>&1"


# Tables and report of the slides that are finished so far. It may run beside a run that is under way.
rule so_far:
    log:
        str(RUN.log("cohort", "so-far")),
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(2000 + 2 * len(BY_FOLDER)),
        runtime=minutes(30 + len(BY_FOLDER) // 50),
    params:
        results=lambda wildcards: config["results"],
        slides=lambda wildcards: config["slides"],
    shell:
        "python -m pipeline status {params.results:q} --slides={params.slides:q} --report 2>&1 | tee {log:q}"
