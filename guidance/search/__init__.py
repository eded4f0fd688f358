"""The search methods, for any sampler and reward: particles with their weights and resampling, selection among
candidates, trees, Feynman-Kac correctors.
"""
