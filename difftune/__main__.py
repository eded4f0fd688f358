"""`python -m difftune`, and `accelerate launch -m difftune train ...`."""

from difftune.cli import main

if __name__ == "__main__":
    main()
