# The composed configuration; every rule asks it where its files lie and how its stage is called.
from headrace.stages.graph import Graph

graph = Graph(config, check_sources=workflow.is_main_process)
