# The stages of one slide, in order. Every slide goes through all of them: if it cannot be processed, the manifests pass
# the reason on, and the cohort lists the slide as failed.


rule inspect:
    input:
        slide=slide_file,
    output:
        manifest=whole(ONE.inspect),
    log:
        str(RUN.log("inspect", "{slide}")),
    benchmark:
        str(RUN.benchmark("inspect", "{slide}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(1000, 50),
        runtime=minutes(20, 10),
        attempt=number_of_attempt,
    params:
        slide=slide_name,
        path=slide_path,
        stamp=slide_stamp,
        mpp=mpp_options,
        reader=config["reader"],
    shell:
        "python -m pipeline inspect --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE "
        "--job-minutes={resources.runtime} --attempt={resources.attempt}/${{JOB_ATTEMPTS:-1}} "
        "--path={params.path:q} {params.mpp:q} --reader={params.reader:q} "
        "--out={output.manifest:q} "
        "> {log:q} 2>&1"


rule tissue:
    input:
        inspect=rules.inspect.output.manifest,
        mask=extra_file("tissue"),
    output:
        manifest=whole(ONE.tissue),
        geojson=whole(ONE.tissue_geojson),
        png=whole(ONE.tissue_png),
    log:
        str(RUN.log("tissue", "{slide}")),
    benchmark:
        str(RUN.benchmark("tissue", "{slide}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(1500, 100),
        runtime=minutes(20, 10),
        attempt=number_of_attempt,
    params:
        slide=slide_name,
        mask=extra_option("tissue", "--mask"),
        stamp=extra_stamp("tissue"),
        mpp=config["tissue"]["mpp"],
        min_area=config["tissue"]["min_area_um2"],
        min_hole=config["tissue"]["min_hole_um2"],
    shell:
        "python -m pipeline tissue --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE "
        "--job-minutes={resources.runtime} --attempt={resources.attempt}/${{JOB_ATTEMPTS:-1}} "
        "--inspect={input.inspect:q} {params.mask:q} "
        "--mpp={params.mpp} --min-area={params.min_area} --min-hole={params.min_hole} "
        "--out={output.manifest:q} --geojson={output.geojson:q} --png={output.png:q} "
        "> {log:q} 2>&1"


rule tiles:
    input:
        inspect=rules.inspect.output.manifest,
        tissue=rules.tissue.output.manifest,
        geojson=rules.tissue.output.geojson,
        model=MODEL_CARD,
        parts=part_files("tiles"),
        part_manifests=part_manifests("tiles"),
    output:
        manifest=whole(ONE.tiles),
        zarr=passing(store(ONE.tiles_zarr), config["tiles"]["keep"]),
    log:
        str(RUN.log("tiles", "{slide}")),
    benchmark:
        str(RUN.benchmark("tiles", "{slide}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: threads_of(4, joins=True)
    resources:
        mem_mb=megabytes(2000, 100, joined=(1500, 20)),
        runtime=minutes(30, 30, joined=(30, 5)),
        attempt=number_of_attempt,
    params:
        slide=slide_name,
        parts=parts_option,
        model=model_folder,
        card=lambda wildcards: card_digest(),
        tile=config["tiles"]["tile"],
        max_unreadable=config["tiles"]["max_unreadable"],
    shell:
        "python -m pipeline tiles --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE "
        "--job-minutes={resources.runtime} --attempt={resources.attempt}/${{JOB_ATTEMPTS:-1}} "
        "{params.parts:q} "
        "--inspect={input.inspect:q} --tissue={input.tissue:q} --geojson={input.geojson:q} --model={params.model:q} "
        "--tile={params.tile} --max-unreadable={params.max_unreadable} --workers={threads} "
        "--out={output.manifest:q} --zarr={output.zarr:q} "
        "> {log:q} 2>&1"


rule stain:
    input:
        tiles=rules.tiles.output.manifest,
        zarr=rules.tiles.output.zarr,
        model=MODEL_CARD,
    output:
        manifest=whole(ONE.stain),
        png=whole(ONE.stain_png),
    log:
        str(RUN.log("stain", "{slide}")),
    benchmark:
        str(RUN.benchmark("stain", "{slide}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(2000),
        runtime=minutes(30),
    params:
        slide=slide_name,
        model=model_folder,
        method=lambda wildcards: config["stain"]["method"],
        strength=option("--strength", config["stain"]["strength"]),
    shell:
        "python -m pipeline stain --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE "
        "--tiles={input.tiles:q} --zarr={input.zarr:q} --model={params.model:q} --method={params.method:q} {params.strength:q} "
        "--out={output.manifest:q} --png={output.png:q} "
        "> {log:q} 2>&1"


rule infer:
    input:
        tiles=rules.tiles.output.manifest,
        zarr=rules.tiles.output.zarr,
        stain=rules.stain.output.manifest,
        model=MODEL_CARD,
        weights=ancient(MODEL_WEIGHTS),
        parts=part_files("infer"),
        part_manifests=part_manifests("infer"),
    output:
        manifest=whole(ONE.maps),
        zarr=passing(store(ONE.maps_zarr), config["infer"]["keep"]),
    log:
        str(RUN.log("infer", "{slide}")),
    benchmark:
        str(RUN.benchmark("infer", "{slide}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: threads_of(8, long=True, joins=True)
    resources:
        mem_mb=megabytes(6000, 100, joined=(1500, 20)),
        runtime=minutes(60, 240, joined=(30, 10)),
        gpu=inference_gpus,
    params:
        slide=slide_name,
        parts=parts_option,
        model=model_folder,
        device=config["infer"]["device"],
        precision=config["infer"]["precision"],
        batch=option("--batch", config["infer"]["batch"]),
    shell:
        "python -m pipeline infer --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE {params.parts:q} "
        "--tiles={input.tiles:q} --zarr={input.zarr:q} --stain={input.stain:q} --model={params.model:q} "
        "--device={params.device:q} --precision={params.precision} {params.batch:q} --threads={threads} "
        "--out={output.manifest:q} --zarr-out={output.zarr:q} "
        "> {log:q} 2>&1"


rule instances:
    input:
        maps=rules.infer.output.manifest,
        zarr=rules.infer.output.zarr,
        tissue=rules.tissue.output.geojson,
        model=MODEL_CARD,
        parts=part_files("instances"),
        part_manifests=part_manifests("instances"),
    output:
        manifest=whole(ONE.instances),
        parquet=passing(whole(ONE.instances_parquet), config["instances"]["keep"]),
    log:
        str(RUN.log("instances", "{slide}")),
    benchmark:
        str(RUN.benchmark("instances", "{slide}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: threads_of(4)
    resources:
        mem_mb=megabytes(4000, 200),
        runtime=minutes(30, 60),
    params:
        slide=slide_name,
        parts=parts_option,
        model=model_folder,
        block=config["instances"]["block"],
        halo=config["instances"]["halo"],
    shell:
        "python -m pipeline instances --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE {params.parts:q} "
        "--maps={input.zarr:q} --maps-manifest={input.maps:q} --tissue={input.tissue:q} --model={params.model:q} "
        "--block={params.block} --halo={params.halo} --workers={threads} "
        "--manifest={output.manifest:q} --out={output.parquet:q} "
        "> {log:q} 2>&1"


rule measure:
    input:
        instances=rules.instances.output.manifest,
        parquet=rules.instances.output.parquet,
        tiles=rules.tiles.output.manifest,
        zarr=rules.tiles.output.zarr,
        stain=rules.stain.output.manifest,
    output:
        manifest=whole(ONE.measure),
        nuclei=whole(ONE.nuclei),
    log:
        str(RUN.log("measure", "{slide}")),
    benchmark:
        str(RUN.benchmark("measure", "{slide}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(2000, 100),
        runtime=minutes(30, 30),
    params:
        slide=slide_name,
    shell:
        "python -m pipeline measure --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE "
        "--instances={input.instances:q} --parquet={input.parquet:q} "
        "--tiles={input.tiles:q} --zarr={input.zarr:q} --stain={input.stain:q} "
        "--out={output.manifest:q} --nuclei={output.nuclei:q} "
        "> {log:q} 2>&1"


rule export:
    input:
        inspect=rules.inspect.output.manifest,
        measure=rules.measure.output.manifest,
        nuclei=rules.measure.output.nuclei,
    output:
        manifest=whole(ONE.export),
        geojson=whole(ONE.nuclei_geojson),
    log:
        str(RUN.log("export", "{slide}")),
    benchmark:
        str(RUN.benchmark("export", "{slide}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: threads_of(2)
    resources:
        mem_mb=megabytes(2000, 100),
        runtime=minutes(20, 20),
    params:
        slide=slide_name,
        origin=config["export"]["origin"],
    shell:
        "python -m pipeline export --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE "
        "--workers={threads} --measure={input.measure:q} --nuclei={input.nuclei:q} "
        "--inspect={input.inspect:q} --origin={params.origin} "
        "--out={output.manifest:q} --geojson={output.geojson:q} "
        "> {log:q} 2>&1"


# Only with export.labels.
rule labels:
    input:
        measure=rules.measure.output.manifest,
        nuclei=rules.measure.output.nuclei,
    output:
        manifest=whole(ONE.labels),
        zarr=directory(str(ONE.labels_zarr)),
    log:
        str(RUN.log("labels", "{slide}")),
    benchmark:
        str(RUN.benchmark("labels", "{slide}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: threads_of(2)
    resources:
        mem_mb=megabytes(2000, 100),
        runtime=minutes(20, 20),
    params:
        slide=slide_name,
    shell:
        "python -m pipeline labels --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE "
        "--workers={threads} --measure={input.measure:q} --nuclei={input.nuclei:q} "
        "--out={output.manifest:q} --zarr={output.zarr:q} "
        "> {log:q} 2>&1"


# Only with a classifier.
rule classify:
    input:
        inspect=rules.inspect.output.manifest,
        tissue=rules.tissue.output.manifest,
        geojson=rules.tissue.output.geojson,
        measure=rules.measure.output.manifest,
        nuclei=rules.measure.output.nuclei,
        classifier=config["classifier"] or [],
    output:
        manifest=whole(ONE.classify),
        parquet=whole(ONE.classified),
        geojson=whole(ONE.classified_geojson),
        png=report(
            whole(ONE.classified_png),
            caption="../report/classified.rst",
            category="Classes",
            labels={"slide": "{slide}"},
        ),
    log:
        str(RUN.log("classify", "{slide}")),
    benchmark:
        str(RUN.benchmark("classify", "{slide}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: threads_of(2)
    resources:
        mem_mb=megabytes(2000, 400),
        runtime=minutes(20, 20),
    params:
        slide=slide_name,
        origin=config["export"]["origin"],
        digest=classifier_digest(),
    shell:
        "python -m pipeline classify --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE "
        "--workers={threads} --inspect={input.inspect:q} --tissue={input.tissue:q} --tissue-geojson={input.geojson:q} "
        "--measure={input.measure:q} --nuclei={input.nuclei:q} --classifier={input.classifier:q} "
        "--origin={params.origin} "
        "--out={output.manifest:q} --parquet={output.parquet:q} --geojson={output.geojson:q} --png={output.png:q} "
        "> {log:q} 2>&1"


# Only where the slide table has regions.
rule regions:
    input:
        inspect=rules.inspect.output.manifest,
        tissue=rules.tissue.output.manifest,
        geojson=rules.tissue.output.geojson,
        picture=rules.tissue.output.png,
        measure=(rules.measure if config["classifier"] is None else rules.classify).output.manifest,
        nuclei=rules.measure.output.nuclei if config["classifier"] is None else rules.classify.output.parquet,
        regions=extra_file("regions"),
    output:
        manifest=whole(ONE.regions),
        png=report(
            whole(ONE.regions_png), caption="../report/regions.rst", category="Regions", labels={"slide": "{slide}"}
        ),
    log:
        str(RUN.log("regions", "{slide}")),
    benchmark:
        str(RUN.benchmark("regions", "{slide}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(2000, 200),
        runtime=minutes(20, 20),
    params:
        slide=slide_name,
        regions=extra_option("regions", "--regions"),
        stamp=extra_stamp("regions"),
    shell:
        "python -m pipeline regions --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE "
        "--inspect={input.inspect:q} --tissue={input.tissue:q} --tissue-geojson={input.geojson:q} "
        "--tissue-png={input.picture:q} --measure={input.measure:q} --nuclei={input.nuclei:q} {params.regions:q} "
        "--out={output.manifest:q} --png={output.png:q} "
        "> {log:q} 2>&1"


rule summary:
    input:
        inspect=rules.inspect.output.manifest,
        tissue=rules.tissue.output.manifest,
        tiles=rules.tiles.output.manifest,
        stain=rules.stain.output.manifest,
        maps=rules.infer.output.manifest,
        instances=rules.instances.output.manifest,
        measure=rules.measure.output.manifest,
        export=rules.export.output.manifest,
        nuclei=rules.measure.output.nuclei,
        geojson=rules.tissue.output.geojson,
        zarr=rules.tiles.output.zarr,
        truth=extra_file("truth"),
    output:
        manifest=whole(ONE.metrics),
        png=report(
            whole(ONE.overview), caption="../report/overview.rst", category="Slides", labels={"slide": "{slide}"}
        ),
    log:
        str(RUN.log("summary", "{slide}")),
    benchmark:
        str(RUN.benchmark("summary", "{slide}"))
    conda:
        "../../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=megabytes(2000, 200),
        runtime=minutes(20, 20),
    params:
        slide=slide_name,
        truth=extra_option("truth", "--truth"),
        stamp=extra_stamp("truth"),
    shell:
        "python -m pipeline summary --slide={params.slide:q} --on-bad-slide=$ON_BAD_SLIDE "
        "--inspect={input.inspect:q} --tissue={input.tissue:q} --tiles={input.tiles:q} --stain={input.stain:q} "
        "--maps={input.maps:q} --instances={input.instances:q} --measure={input.measure:q} --export={input.export:q} "
        "--nuclei={input.nuclei:q} --tissue-geojson={input.geojson:q} --tiles-zarr={input.zarr:q} {params.truth:q} "
        "--out={output.manifest:q} --png={output.png:q} "
        "> {log:q} 2>&1"
