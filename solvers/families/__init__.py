"""The model families, one per file (UNets and transformers): how a network is told its conditions, how it is called,
and how its attention is patched or replaced.
"""
