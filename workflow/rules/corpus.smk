rule corpus_scans:
    output:
        done=graph.batch("corpus", "corpus_scans", ".done"),
    log:
        graph.batch("corpus", "corpus_scans", ".log"),
    benchmark:
        graph.batch("corpus", "corpus_scans", ".tsv")
    wildcard_constraints:
        batch="[0-9]{5}[0-9]*",
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=240,
    message:
        "corpus: scan the sources, batch {wildcards.batch}"
    shell:
        graph.batch_command("corpus", "corpus_scans")


rule corpus:
    input:
        scans=expand(
            graph.batch("corpus", "corpus_scans", ".done"), batch=graph.scan_batches()
        ),
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
        runtime=graph.corpus_minutes(),
    message:
        "corpus: read, deduplicate and split the sources"
    shell:
        graph.command("corpus")
