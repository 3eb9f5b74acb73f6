rule tokenizer:
    input:
        corpus=graph.done("corpus"),
    output:
        done=graph.done("tokenizer"),
    log:
        graph.log("tokenizer"),
    benchmark:
        graph.file("tokenizer", "benchmark.tsv")
    conda:
        "../envs/main.yaml"
    threads: 2
    resources:
        mem_mb=8000,
        runtime=120,
    message:
        "tokenizer: learn or load the vocabulary"
    shell:
        graph.command("tokenizer")


rule tokenize_plan:
    input:
        corpus=graph.done("corpus"),
        tokenizer=graph.done("tokenizer"),
    output:
        done=graph.batch("tokenize", "tokenize_plan", ".done"),
    log:
        graph.batch("tokenize", "tokenize_plan", ".log"),
    benchmark:
        graph.batch("tokenize", "tokenize_plan", ".tsv")
    wildcard_constraints:
        batch="00000",
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    message:
        "tokenize: decide which documents each shard holds"
    shell:
        graph.batch_command("tokenize", "tokenize_plan")


rule tokenize_shards:
    input:
        corpus=graph.done("corpus"),
        tokenizer=graph.done("tokenizer"),
        plan=expand(graph.batch("tokenize", "tokenize_plan", ".done"), batch="00000"),
    output:
        done=graph.batch("tokenize", "tokenize_shards", ".done"),
    log:
        graph.batch("tokenize", "tokenize_shards", ".log"),
    benchmark:
        graph.batch("tokenize", "tokenize_shards", ".tsv")
    wildcard_constraints:
        batch="[0-9]{5}[0-9]*",
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=240,
    message:
        "tokenize: token shards, batch {wildcards.batch}"
    shell:
        graph.batch_command("tokenize", "tokenize_shards")


rule tokenize:
    input:
        corpus=graph.done("corpus"),
        tokenizer=graph.done("tokenizer"),
        batches=expand(
            graph.batch("tokenize", "tokenize_shards", ".done"),
            batch=graph.shard_batches(),
        ),
    output:
        done=graph.done("tokenize"),
    log:
        graph.log("tokenize"),
    benchmark:
        graph.file("tokenize", "benchmark.tsv")
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    message:
        "tokenize: gather the shards into a dataset"
    shell:
        graph.command("tokenize")
