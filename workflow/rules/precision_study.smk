rule precision_study:
    input:
        tokenize=graph.study_input,
    output:
        done=graph.done("precision_study"),
        html=report(
            graph.file("precision_study", "precision_study.html"),
            caption="../report/precision_study.rst",
            category="Precision study",
        ),
    log:
        graph.log("precision_study"),
    benchmark:
        graph.file("precision_study", "benchmark.tsv")
    conda:
        "../envs/main.yaml"
    threads: workflow.cores
    resources:
        mem_mb=8000,
        runtime=1440,
    message:
        "precision_study: train in two formats with paired seeds, and compare"
    shell:
        graph.page_command("precision_study", "precision_study.html")
