# Huge slides in parts: each of these jobs does a share of a stage for one slide, and the stage's own rule joins them.


wildcard_constraints:
    part=r"\d+-of-\d+",


use rule tiles as tiles_part with:
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
    threads: 4
    resources:
        mem_mb=megabytes(2000, 100 / PARTS),
        runtime=minutes(30, 30 / PARTS),
        attempt=number_of_attempt,
    params:
        parts=part_option,


use rule infer as infer_part with:
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
    threads: 8
    resources:
        mem_mb=megabytes(6000, 100 / PARTS),
        runtime=minutes(60, 240 / PARTS),
        gpu=mapping_gpus(),
    params:
        parts=part_option,


# The output `parquet` of a part is a store, as for the other stages; it keeps the name because the command that is
# inherited from the stage's rule uses it.
use rule instances as instances_part with:
    input:
        maps=rules.infer.output.manifest,
        zarr=rules.infer.output.zarr,
        tissue=rules.tissue.output.geojson,
        model=MODEL_CARD,
    output:
        manifest=part_outputs("instances")[0],
        parquet=part_outputs("instances")[1],
    log:
        str(RUN.log("instances", "{slide}.{part}")),
    benchmark:
        str(RUN.benchmark("instances", "{slide}.{part}"))
    threads: 4
    resources:
        mem_mb=megabytes(4000, 200 / PARTS),
        runtime=minutes(30, 60 / PARTS),
    params:
        parts=part_option,
