"""The command line: one file per group of commands, where a flag is added; it reads flags, prints results, and
decides nothing. What a flag sets is a field in `difftune/configs`.
"""
