"""The command line: one file per group of commands; it reads flags, prints results, and decides nothing.

The flags of train, search and optimize are the fields of their Config (`difftune/configs`); those of the other commands
are added here.
"""
