rule tile:
    input:
        slide=slide_file,
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


rule encode:
    input:
        slide=slide_file,
        tiles=PATHS.tiles("{slide}").h5,
    output:
        features=PATHS.features("{slide}"),
        timing=PATHS.timing("{slide}"),
    log:
        PATHS.log("encode", "{slide}"),
    priority: 20
    conda:
        "../../envs/slides.yaml"
    resources:
        mem_mb=2000,
    params:
        key=key_of("encode"),
        code=code_hash("encode"),
    message:
        "encode {wildcards.slide}"
    shell:
        "morphome encode --slide {wildcards.slide:q} --path {input.slide:q} > {log:q} 2>&1"


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
            features=[PATHS.features(slide) for slide in SLIDES],
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
