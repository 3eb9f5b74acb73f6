"""Files that the rest trusts: manifests with hashes, atomic publish, safetensors with caps.

It knows nothing of stages or configuration; it reads and writes folders that it is handed.
"""
