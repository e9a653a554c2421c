# A job takes a group of slides (slides.per_job): a graph of ten thousand slides stays small, and an encoder is loaded
# once for all. The files of a slide are its own, and Snakemake does not see them: they are written whole or not at all,
# and a job passes over every slide whose files are there and belong to this slide, these settings and code. So a killed
# job loses one slide at most, and a slide that is added or changed is the only one that is done again.
rule tile:
    input:
        slides=slide_files,
        masks=masks_of_job,
        segmenter=CONFIG["tiling"].get("segmenter_weights", []),
    output:
        PATHS.tile_job("{job}"),
    log:
        PATHS.log("tile", "{job}"),
    priority: 10
    conda:
        "../../envs/slides.yaml"
    resources:
        mem_mb=2000,
    params:
        slides=slides_of_job,
        key=keys_of_job("tile"),
        code=code_hash("tile"),
    message:
        "tile {wildcards.job}: {params.slides[0]} ..."
    shell:
        "morphome tile --job {wildcards.job} > {log:q} 2>&1"


if fetched_weights(CONFIG):

    rule weights:
        output:
            PATHS.weights,
        log:
            PATHS.log("weights"),
        priority: 100
        localrule: True
        conda:
            "../../envs/slides.yaml"
        resources:
            network=1,
        message:
            "weights: of the encoder"
        shell:
            "morphome weights > {log:q} 2>&1"


rule encode:
    input:
        slides=slide_files,
        tiles=PATHS.tile_job("{job}"),
        weights=PATHS.weights if fetched_weights(CONFIG) else [],
    output:
        PATHS.encode_job("{job}"),
    log:
        PATHS.log("encode", "{job}"),
    priority: 20
    conda:
        "../../envs/slides.yaml"
    resources:
        # Each thread keeps rows of decoded tiles; a retry after an out-of-memory kill asks for more.
        mem_mb=lambda wildcards, threads, attempt: (4000 + 500 * threads) * attempt,
    params:
        slides=slides_of_job,
        key=keys_of_job("encode"),
        code=code_hash("encode"),
    message:
        "encode {wildcards.job}: {params.slides[0]} ..."
    shell:
        "morphome encode --job {wildcards.job} --threads {threads} > {log:q} 2>&1"


if CONFIG["features"]["source"] == "external":

    rule import_features:
        input:
            slides=PATHS.slides,
            external=external_feature_files(CONFIG),
        output:
            index=PATHS.index,
            audit=PATHS.audit,
        log:
            PATHS.log("collect"),
        conda:
            "../../envs/models.yaml"
        resources:
            mem_mb=4000,
        params:
            key=key_of("import"),
            code=code_hash("import"),
        message:
            "import_features: index of features made elsewhere"
        shell:
            "morphome collect > {log:q} 2>&1"

else:

    rule collect:
        input:
            features=encoded,
            tiles=tiled,
        output:
            index=PATHS.index,
            audit=PATHS.audit,
        log:
            PATHS.log("collect"),
        conda:
            "../../envs/models.yaml"
        resources:
            mem_mb=4000,
        params:
            key=key_of("collect"),
            code=code_hash("collect"),
        message:
            "collect: index of all features"
        shell:
            "morphome collect > {log:q} 2>&1"
