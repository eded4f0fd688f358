"""Rewards that are trained networks (CLIP models, aesthetic heads, vision-language models, text readers), and what they
do to a picture first.
"""
