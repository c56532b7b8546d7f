"""`python -m bkd`, which is also what `accelerate launch -m bkd` runs."""

from bkd.cli.app import main

if __name__ == "__main__":
    main()
