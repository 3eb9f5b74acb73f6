# Headrace: raw text to a published DeepSeek-V3-style model.
#
#   snakemake                                     the whole pipeline, experiment=demo
#   snakemake evaluate                            one stage and what it needs
#   snakemake --config experiment=tiny            another run (targets come before --config)
#   snakemake --config set="recipe.learning_rate.peak=2e-3"
#   snakemake precision_study                     FP8 against BF16 with paired seeds; not part of the whole
#   snakemake compare --config runs=[a,b,c]       finished evaluations side by side, paired
#   snakemake --config experiment=ablations       the paper's comparisons at demo size, in one go; also a target
#   snakemake -n                                  what would run, and why
from snakemake.utils import min_version

min_version("9.27")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"


rule all:
    default_target: not graph.ablates
    input:
        report=graph.done("report"),


# Here, because Snakemake passes over the default target of a file that is included.
rule ablations:
    default_target: graph.ablates
    log:
        graph.ablations_log(),
    localrule: True
    conda:
        "workflow/envs/main.yaml"
    threads: workflow.cores
    message:
        "ablations: the paper's comparisons at demo size, trained, evaluated and compared"
    shell:
        graph.ablations_command()


include: "workflow/rules/corpus.smk"
include: "workflow/rules/tokens.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/convert.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/publish.smk"
include: "workflow/rules/precision_study.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/compare.smk"
include: "workflow/rules/sync.smk"
