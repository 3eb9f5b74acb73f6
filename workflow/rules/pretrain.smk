rule pretrain:
    input:
        tokenize=graph.done("tokenize"),
    output:
        done=graph.done("pretrain"),
    log:
        graph.log("pretrain"),
    benchmark:
        graph.file("pretrain", "benchmark.tsv")
    conda:
        "../envs/main.yaml"
    threads: workflow.cores
    resources:
        mem_mb=8000,
        runtime=1440,
    message:
        "pretrain: train the model"
    shell:
        graph.command("pretrain")
