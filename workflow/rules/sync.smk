rule sync:
    log:
        graph.sync_log(),
    localrule: True
    conda:
        "../envs/main.yaml"
    message:
        "sync: upload offline W&B runs and replay their lineage"
    shell:
        graph.sync_command()
