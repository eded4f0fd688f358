"""Scores from other machines: a reward server and its client, judges behind OpenAI's protocol, and the HTTP below them.

Another kind of server that scores pictures belongs here.
"""
