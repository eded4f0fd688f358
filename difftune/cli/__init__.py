"""The command line: one file per group of commands; it reads flags, prints results, and decides nothing."""
