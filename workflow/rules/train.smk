# snakemake train: a model package from the training data of the settings.
TRAINED = Path("models") / config["train"]["name"]


rule train:
    input:
        str(TRAINED / "model.json"),
        str(TRAINED / "weights.safetensors"),


rule train_settings:
    output:
        settings=whole(RUN.training_settings(TRAINED.name)),
    log:
        str(RUN.log("train", f"{TRAINED.name}.settings")),
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(500),
        runtime=5,
    params:
        settings=lambda wildcards: as_json(config["train"]),
    shell:
        "printf '%s\\n' {params.settings:q} > {output.settings:q} 2> {log:q}"


# Its checkpoints are no output: Snakemake would remove them, and a training that was stopped could not go on.
rule train_model:
    input:
        settings=rules.train_settings.output.settings,
    output:
        card=whole(TRAINED / "model.json"),
        weights=whole(TRAINED / "weights.safetensors"),
    log:
        str(RUN.log("train", TRAINED.name)),
    benchmark:
        str(RUN.benchmark("train", TRAINED.name))
    conda:
        "../../envs/pipeline.yaml"
    threads: 16
    resources:
        mem_mb=megabytes(16000),
        runtime=2880,
    params:
        work=lambda wildcards: str(RUN.training(TRAINED.name)),
        folder=lambda wildcards, output: os.path.dirname(output.card),
    shell:
        "python -m pipeline train --config-json={input.settings:q} --work={params.work:q} --out={params.folder:q} "
        "--threads={threads} > {log:q} 2>&1"
