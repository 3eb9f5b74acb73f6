"""How ranks share the work: the mesh, tokens sent to experts on other ranks, summed gradients, sharded moments.

It knows nothing of pipelines or schedules.
"""
