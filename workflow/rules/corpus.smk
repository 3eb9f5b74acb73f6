rule corpus:
    output:
        done=graph.done("corpus"),
    log:
        graph.log("corpus"),
    benchmark:
        graph.file("corpus", "benchmark.tsv")
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=120,
    message:
        "corpus: read, deduplicate and split the sources"
    shell:
        graph.command("corpus")
