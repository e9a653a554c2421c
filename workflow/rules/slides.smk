rule tile:
    input:
        slide=slide_file,
        mask=lambda wildcards: mask_file(CONFIG, wildcards.slide) or [],
        segmenter=CONFIG["tiling"].get("segmenter_weights", []),
    output:
        h5=PATHS.tiles("{slide}").h5,
        qc=PATHS.tiles("{slide}").qc,
        geojson=PATHS.tiles("{slide}").geojson,
        thumbnail=PATHS.tiles("{slide}").thumbnail,
    log:
        PATHS.log("tile", "{slide}"),
    priority: 10
    conda:
        "../../envs/slides.yaml"
    resources:
        mem_mb=2000,
    params:
        key=key_of("tile"),
        code=code_hash("tile"),
    message:
        "tile {wildcards.slide}"
    shell:
        "morphome tile --slide {wildcards.slide:q} --path {input.slide:q} > {log:q} 2>&1"


# One job encodes a group of slides, so that an encoder is loaded once for all of them. The features of a slide are its
# own file, which Snakemake does not see: it is written whole or not at all, and a job passes over every slide whose
# file is there and belongs to this slide, these tiles, settings and code. So a killed job loses one slide at most, and
# a slide that is added or changed is the only one that is encoded.
rule encode:
    input:
        slides=lambda wildcards: [SLIDES[slide] for slide in slides_of_job(wildcards)],
        tiles=lambda wildcards: [
            PATHS.tiles(slide).h5 for slide in slides_of_job(wildcards)
        ],
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
        key=lambda wildcards: [
            step_key(CONFIG, "encode", slide=slide)
            for slide in slides_of_job(wildcards)
        ],
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
            features=ENCODED,
            qc=[PATHS.tiles(slide).qc for slide in SLIDES],
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
