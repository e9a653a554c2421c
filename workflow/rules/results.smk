rule evaluate:
    input:
        predictions=[
            folder / "predictions.parquet" for _, folder in run_folders(CONFIG)
        ],
        facts=PATHS.split_facts,
    output:
        PATHS.evaluation_tables,
    log:
        PATHS.log("evaluate"),
    conda:
        "../../envs/models.yaml"
    resources:
        mem_mb=4000,
    params:
        key=key_of("evaluate"),
        code=code_hash("evaluate"),
    message:
        "evaluate: all models"
    shell:
        "morphome evaluate > {log:q} 2>&1"


rule report:
    input:
        flows=[PATHS.cohort_flow, PATHS.analysis_flow],
        cohort=[PATHS.patients, PATHS.slides],
        patients=PATHS.analysis,
        audit=PATHS.audit,
        tiles=tiled,
        encoded=encoded,
        splits=[PATHS.splits, PATHS.split_facts],
        evaluation=PATHS.evaluation_tables,
        runs=[folder / "run.json" for _, folder in run_folders(CONFIG)],
        panels=list(PATHS.panels.values()),
        query=PATHS.gdc_query if "gdc" in CONFIG else [],
        rna_encoder=PATHS.encoded_facts if encodes_rna(CONFIG) else [],
        groups=PATHS.groups or [],
        oracle=PATHS.oracle if "simulate" in CONFIG else [],
    output:
        page=report(
            PATHS.report,
            caption="../report/report.rst",
            category="Report",
            labels={"run": CONFIG["name"]},
        ),
        tables=PATHS.report_tables,
    log:
        PATHS.log("report"),
    conda:
        "../../envs/report.yaml"
    resources:
        mem_mb=4000,
    params:
        key=key_of("report"),
        code=code_hash("report"),
    message:
        "report: the page and its tables"
    shell:
        "morphome report > {log:q} 2>&1"
