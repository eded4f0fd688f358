"""The samplers, singlestep and multistep, of order 1 to 4: each is one function that carries latents from one noise
level to the next.
"""
