"""`python -m difftune`, and `accelerate launch -m difftune train ...`."""

from difftune.cli.program import main

if __name__ == "__main__":
    main()
