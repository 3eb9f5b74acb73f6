"""The stages of the pipeline: the table, the run directory, and one door per stage.

A door wires rooms together: it hands them paths and values and returns the key figures. No door computes anything.
"""
