"""Pipeline parallelism with schedules as data: generate, validate, simulate, execute, overlap.

A schedule is a list of actions per rank (`schedule.py`). No engine knows a schedule by name: it reads its actions.
"""
