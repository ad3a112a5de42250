# snakemake train: a model package from the training data of the settings.
import json

TRAINED = Path("models") / config["train"]["name"]


rule train:
    input:
        str(TRAINED / "model.json"),
        str(TRAINED / "weights.safetensors"),


rule train_model:
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
        settings=json.dumps(config["train"], sort_keys=True),
        folder=lambda wildcards, output: os.path.dirname(output.card),
    shell:
        "python -m pipeline train --config-json={params.settings:q} --out={params.folder:q} > {log:q} 2>&1"
