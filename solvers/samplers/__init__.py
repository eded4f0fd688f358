"""The samplers, singlestep and multistep, of order 1 to 4: each is one function from a noise level to the next."""
