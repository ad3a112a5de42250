# Huge slides in parts: each of these jobs does a share of a stage for one slide; the stage's own rule puts them together.


wildcard_constraints:
    part=r"\d+-of-\d+",


rule tiles_part:
    input:
        inspect=rules.inspect.output.manifest,
        tissue=rules.tissue.output.manifest,
        geojson=rules.tissue.output.geojson,
        model=MODEL_CARD,
    output:
        manifest=part_outputs("tiles")[0],
        zarr=part_outputs("tiles")[1],
    log:
        str(RUN.log("tiles", "{slide}.{part}")),
    benchmark:
        str(RUN.benchmark("tiles", "{slide}.{part}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: 4
    resources:
        mem_mb=megabytes(2000, 100 / PARTS),
        runtime=minutes(30, 30 / PARTS),
        attempt=number_of_attempt,
    params:
        slide=slide_name,
        part=part_option,
        model=model_folder,
        tile=config["tiles"]["tile"],
    shell:
        "python -m pipeline tiles --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE "
        "--job-minutes={resources.runtime} --attempt={resources.attempt}/${{JOB_ATTEMPTS:-1}} "
        "{params.part} "
        "--inspect={input.inspect:q} --tissue={input.tissue:q} --geojson={input.geojson:q} --model={params.model:q} "
        "--tile={params.tile} --workers={threads} "
        "--out={output.manifest:q} --zarr={output.zarr:q} "
        "> {log:q} 2>&1"


rule infer_part:
    input:
        tiles=rules.tiles.output.manifest,
        zarr=rules.tiles.output.zarr,
        stain=rules.stain.output.manifest,
        model=MODEL_CARD,
        weights=ancient(MODEL_WEIGHTS),
    output:
        manifest=part_outputs("infer")[0],
        zarr=part_outputs("infer")[1],
    log:
        str(RUN.log("infer", "{slide}.{part}")),
    benchmark:
        str(RUN.benchmark("infer", "{slide}.{part}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: 8
    resources:
        mem_mb=megabytes(6000, 100 / PARTS),
        runtime=minutes(60, 240 / PARTS),
        gpu=own_gpus(config["infer"]["device"]),
    params:
        slide=slide_name,
        part=part_option,
        model=model_folder,
        device=config["infer"]["device"],
        precision=config["infer"]["precision"],
        batch=batch_options,
    shell:
        "python -m pipeline infer --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE {params.part} "
        "--tiles={input.tiles:q} --zarr={input.zarr:q} --stain={input.stain:q} --model={params.model:q} "
        "--device={params.device:q} --precision={params.precision} {params.batch:q} --threads={threads} "
        "--out={output.manifest:q} --zarr-out={output.zarr:q} "
        "> {log:q} 2>&1"


rule instances_part:
    input:
        maps=rules.infer.output.manifest,
        zarr=rules.infer.output.zarr,
        tissue=rules.tissue.output.geojson,
        model=MODEL_CARD,
    output:
        manifest=part_outputs("instances")[0],
        zarr=part_outputs("instances")[1],
    log:
        str(RUN.log("instances", "{slide}.{part}")),
    benchmark:
        str(RUN.benchmark("instances", "{slide}.{part}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: 4
    resources:
        mem_mb=megabytes(4000, 200 / PARTS),
        runtime=minutes(30, 60 / PARTS),
    params:
        slide=slide_name,
        part=part_option,
        model=model_folder,
        block=config["instances"]["block"],
        halo=config["instances"]["halo"],
    shell:
        "python -m pipeline instances --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE {params.part} "
        "--maps={input.zarr:q} --maps-manifest={input.maps:q} --tissue={input.tissue:q} --model={params.model:q} "
        "--block={params.block} --halo={params.halo} --workers={threads} "
        "--manifest={output.manifest:q} --out={output.zarr:q} "
        "> {log:q} 2>&1"
