"""Starting and stopping: the device, the deadline, the ranks of a layout and who watches over them.

    parent (a stage)                                 each of `world` ranks
    start.py       starts the ranks, hosts a store   rank.py       joins, does its work, reports how it ended
    supervisor.py  relays, watches, ends             heartbeat.py  says every half second what the rank is at
    blame.py       which rank is to blame            wire.py       what both say to each other through the store

It knows nothing of stages or models.
"""
