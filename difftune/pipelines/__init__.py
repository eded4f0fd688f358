"""A diffusers pipeline: opened by name, given a LoRA, equipped with a guidance method, sampled from, fitted to the
memory.
"""
