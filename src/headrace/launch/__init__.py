"""Starting and stopping: the device, the deadline, the commands that start ranks.

It knows nothing of stages or models.
"""
